"""Braces in the names of shards, as in bash and in what webdataset and img2dataset read.

`{00000..00012}` is each number of a range, `{12..00}` the same downwards, `{0..12..4}` every fourth; `{a..c}` is each
letter; `{a,b}` is each of the words, which may hold braces again. Leading zeros stay. Any other brace means itself. How
many names there are is arithmetic, and they are made one at a time: a range may be longer than the memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from vlm_train.errors import DataError

_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", re.ASCII)
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?", re.ASCII)
_MAX_DIGITS = 18  # what a range can count
_MAX_BRACES = 30


@dataclass(frozen=True, slots=True)
class Span:
    """A range of numbers of at least `width` signs, or of letters."""

    numbers: range
    width: int = 0
    letters: bool = False

    def __iter__(self) -> Iterator[str]:
        return map(chr if self.letters else self._number, self.numbers)

    def _number(self, number: int) -> str:
        return f"{number:0{self.width}d}"


@dataclass(frozen=True, slots=True)
class Words:
    """Alternatives, each an expression."""

    choices: tuple[Expression, ...]


Expression = tuple[str | Span | Words, ...]
"""Parts, one after the other."""


def parse(pattern: str, end_of_words: int | None = None) -> Expression:
    """What a pattern says. From `end_of_words` on (the query of a URL) only ranges of numbers are read.

    Raises:
        DataError: more than 30 braces.
    """
    if pattern.count("{") > _MAX_BRACES:
        raise DataError("too many braces in the name of a shard", got=f"{pattern[:60]}...", allowed=f"{_MAX_BRACES}",
                        remedy="give a list of patterns")  # fmt: skip
    end = len(pattern) if end_of_words is None else end_of_words
    query = tuple(_range_or_text(piece) for piece in re.split(r"(\{\d+\.\.\d+\})", pattern[end:]) if piece)
    return _parse(pattern[:end]) + query


def num_names(expression: Expression) -> int:
    """How many names an expression stands for, repeated ones counted too."""
    return math.prod(map(_num_choices, expression))


def names(expression: Expression) -> Iterator[str]:
    """The names, in order: the last part changes first."""
    if not expression:
        yield ""
        return
    for head in _choices(expression[0]):
        for tail in names(expression[1:]):
            yield head + tail


def _num_choices(part: str | Span | Words) -> int:
    if isinstance(part, Words):
        return sum(map(num_names, part.choices))
    return 1 if isinstance(part, str) else len(part.numbers)


def _choices(part: str | Span | Words) -> Iterator[str]:
    if isinstance(part, Words):
        for choice in part.choices:
            yield from names(choice)
    else:
        yield from [part] if isinstance(part, str) else part


def _parse(text: str) -> Expression:
    start = text.find("{")
    end, commas = _closing(text, start)
    if start < 0 or end < 0:
        return (text,) if start < 0 else (text[: start + 1], *_parse(text[start + 1 :]))
    inside, before, after = text[start + 1 : end], text[:start], _parse(text[end + 1 :])
    if commas:
        cuts = [start, *commas, end]
        words = (text[left + 1 : right] for left, right in pairwise(cuts))
        return (before, Words(tuple(map(_parse, words))), *after)
    span = _span(inside)
    return (before, span, *after) if span else (before, "{", *_parse(inside), "}", *after)


def _closing(text: str, start: int) -> tuple[int, list[int]]:
    """Where the brace that opens at `start` closes, -1 if nowhere; and the commas between that belong to it."""
    depth = 0
    commas: list[int] = []
    for place in range(max(start, 0), len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place, commas
        if depth == 1 and text[place] == ",":
            commas.append(place)
    return -1, []


def _range_or_text(text: str) -> str | Span:
    return (_span(text[1:-1]) if text.startswith("{") else None) or text


def _span(text: str) -> Span | None:
    """A range of numbers or letters, both ends included, upwards or downwards."""
    if match := _NUMBERS.fullmatch(text):
        first, last, step = match[1], match[2], match[3] or "1"
        if max(map(len, (first, last, step))) > _MAX_DIGITS:
            raise DataError("a range of shards is too long", got=f"{{{text[:60]}}}",
                            allowed=f"numbers of at most {_MAX_DIGITS} digits", remedy="shorten the range")  # fmt: skip
        padded = any(re.match(r"-?0.", end) for end in (first, last))
        return Span(_inclusive(int(first), int(last), int(step)), max(len(first), len(last)) if padded else 0)
    if match := _LETTERS.fullmatch(text):
        step = (match[3] or "1")[:_MAX_DIGITS]
        return Span(_inclusive(ord(match[1]), ord(match[2]), int(step)), letters=True)
    return None


def _inclusive(first: int, last: int, step: int) -> range:
    step = max(step, 1)
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
