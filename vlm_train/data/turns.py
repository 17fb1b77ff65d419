"""What is said first in a dialogue that nobody has checked yet; `chat.turns_of` is for one that is to be learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ASSISTANTS = ("assistant", "gpt")


def first_answer(metadata: Mapping[str, Any]) -> list[str]:
    """The first turn of the assistant in `conversations` of KEY.json; empty where there is none, or it is no text."""
    turns = metadata.get("conversations")
    spoken = [
        turn.get("content", turn.get("value"))
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in _ASSISTANTS
    ]
    return [text for text in spoken[:1] if isinstance(text, str)]
