"""The prompts of a report: a card for each, with its pictures, and what the model answered at each evaluation, the
newest first, which stays in sight where there are many."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm_train.evaluation.answers import normalise

_MARK = "<image>"  # where a picture is read in a prompt; the card shows it

Rows = Sequence[Mapping[str, Any]]


def prompt_cards(history: Rows, media: Path) -> str:
    """Every prompt that the newest evaluation asked, with its answers of all evaluations; nothing where none was asked.

    Args:
        history: results by step, ascending; those with `answers` are of `evaluation.fixed_prompts`.
        media: where their pictures lie.
    """
    told = [row for row in history if isinstance(row.get("answers"), list)]
    cards = []
    for asked in told[-1]["answers"] if told else []:
        same = [(row["step"], each) for row in told for each in row["answers"] if _identity(each) == _identity(asked)]
        cards.append(_card(asked, same, media))
    return f'<div class="prompts">{"".join(cards)}</div>' if cards else ""


def _identity(asked: Mapping[str, Any]) -> str:
    return json.dumps([asked[key] for key in ("image", "prompt", "pictures")])


def _card(asked: Mapping[str, Any], answers: Sequence[tuple[int, Mapping[str, Any]]], media: Path) -> str:
    text = " ".join(asked["prompt"].replace(_MARK, " ").split())
    expected = asked["expected"]
    heading = f"<b>{escape(text)}</b>" if text else '<b class="dim">the picture alone</b>'
    wanted = f'<div class="wanted"><span>expected</span> {escape(expected)}</div>' if expected is not None else ""
    rows = "".join(reversed([_answer(steps, each, expected) for steps, each in _runs(answers)]))
    return (
        f'<div class="card prompt">{_thumbnails(asked, media)}<div class="asked">{heading}{wanted}</div>'
        '<table tabindex="0"><thead><tr><th scope="col">step</th><th scope="col">answer</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _runs(answers: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Answers with their steps, one for each time that the answer changed."""
    for _, group in groupby(answers, key=lambda item: (item[1]["answer"], item[1]["reason"])):
        run = list(group)
        first, last = f"{run[0][0]:,}", f"{run[-1][0]:,}"
        yield first if first == last else f"{first} – {last}", run[0][1]  # noqa: RUF001 (a range of steps)


def _answer(steps: str, told: Mapping[str, Any], expected: str | None) -> str:
    if told["answer"] is None:
        return f'<tr><td>{steps}</td><td class="dim">not answered: {escape(str(told["reason"]))}</td></tr>'
    said = told["answer"].strip()
    is_right = expected is not None and bool(said) and normalise(said) == normalise(expected)
    mark = '<span class="good" title="as expected">✓</span> ' if is_right else ""
    text = escape(said) if said else '<span class="dim">nothing</span>'
    return f"<tr><td>{steps}</td><td>{mark}{text}</td></tr>"


def _thumbnails(asked: Mapping[str, Any], media: Path) -> str:
    """The pictures inside the document; one that is not there is left out."""
    images = []
    for name in asked["pictures"]:
        path = media / f"prompt-{name}.png"
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            images.append(f'<img src="data:image/png;base64,{data}" alt="{escape(asked["image"], quote=True)}">')
    return f'<div class="thumbnails">{"".join(images)}</div>' if images else ""
