"""The chat template that comes with a tokenizer of Hugging Face, as a `chat.Template`.

Such a template is a program, and what it writes is one string in which a turn that spells out a special token cannot be
told from the token. So it is given stand-ins for what is said, and its answer is cut at these: what is said never goes
through the template, which cannot change it either (many trim spaces), and where each turn lies is known exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_train.data.chat import Segment, Text, Token, Turn, frame, said
from vlm_train.data.decode import SampleError
from vlm_train.errors import ConfigError

_EDGE = "\U0010fffd"
_STAND_IN = re.compile(f"{_EDGE}([0-9]+){_EDGE}")


class OwnTemplate:
    """A tokenizer's chat template.

    `stop`: the token that ends a turn of the assistant: the first one behind an answer, with the spaces before it.

    Args:
        inner: a tokenizer of `transformers` with a `chat_template`.

    Raises:
        ConfigError: it has none, or one that wants more than texts (as some of processors do), or no token behind an
            answer.
    """

    stop_is_text = False

    def __init__(self, inner: Any) -> None:
        if not getattr(inner, "chat_template", None):
            raise ConfigError(
                "template=own, but the tokenizer brings no chat template",
                got=type(inner).__name__,
                allowed="a tokenizer of Hugging Face with a chat_template",
                remedy="choose a template of ours: plain, vicuna, llama3, chatml, mistral",
            )
        self._inner = inner
        added = inner.backend_tokenizer.get_added_tokens_decoder().values()
        self.tokens = tuple(token.content for token in added if token.special)
        try:
            tail = self._frames([Turn("user", "?"), Turn("assistant", "!")], answers=True)[-1]
        except SampleError as error:
            raise ConfigError(
                "the tokenizer's chat template cannot lay out texts", got=error.detail,
                allowed="one that writes what is said by user and assistant as it is",
                remedy="choose a template of ours: plain, vicuna, llama3, chatml, mistral",
            ) from error  # fmt: skip
        behind = list(frame(tail.lstrip(), [token.content for token in added]))[:2]
        if len(behind) < 2 or behind[0] != Text("") or not isinstance(behind[1], Token):
            raise ConfigError(
                "the tokenizer's chat template ends an answer without a special token", got=repr(tail),
                allowed="a token behind an answer, without which a model cannot learn to stop",
                remedy="choose a template of ours: plain, vicuna, llama3, chatml, mistral",
            )  # fmt: skip
        self.stop = behind[1].name
        self.tokens = (*self.tokens, self.stop)  # which may have been added as an ordinary one

    def lay_out(self, turns: Sequence[Turn], answers: bool) -> Iterator[Segment]:
        """See `chat.Template`."""
        frames = self._frames(turns, answers)
        yield from frame(frames[0], self.tokens)
        for turn, behind in zip(turns, frames[1:], strict=True):
            yield from said(turn)
            spaces = behind[: len(behind) - len(behind.lstrip())]
            if turn.role == "assistant" and behind.startswith(self.stop, len(spaces)):
                yield Text(spaces, is_learned=True)
                yield Token(self.stop, is_learned=True)
                behind = behind[len(spaces) + len(self.stop) :]
            yield from frame(behind, self.tokens)

    def _frames(self, turns: Sequence[Turn], answers: bool) -> list[str]:
        """What stands before, between and behind the turns."""
        messages = [{"role": turn.role, "content": f"{_EDGE}{place}{_EDGE}"} for place, turn in enumerate(turns)]
        try:
            text = self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answers)
        except Exception as error:  # a template refuses what it likes, each in its own way
            raise SampleError("dialogue_roles", got=error, allowed="what the chat template takes") from None
        parts = _STAND_IN.split(text)
        if parts[1::2] != [str(place) for place in range(len(turns))]:
            raise SampleError("dialogue_roles", got="the chat template leaves a turn out or says one twice")
        return parts[::2]
