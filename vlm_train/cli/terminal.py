"""What a terminal can show of a line: so many characters, of its encoding, in colours where they are wanted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

Line = str | Sequence[tuple[str, str]]
"""A line of text, or its parts, each with its colour `#rrggbb`, or an empty text for none."""

CUT = "…"
"""Stands where a line is longer than the terminal is wide."""

_UPPER, _LOWER = 0x1B, 0xE4  # dots of a braille character
_PLAIN = {ord("█"): "#", ord("░"): ".", ord("■"): "#", ord("●"): "*", ord(CUT): ">"}
_PLAIN |= {0x2800 + dots: "'" if not dots & _LOWER else "." if not dots & _UPPER else ":" for dots in range(1, 256)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """`width`, `height`: in characters; `colour`: whether it is to have colours; `encoding`: of what it shows."""

    width: int
    height: int
    colour: bool
    encoding: str = "utf-8"

    def shown(self, line: Line) -> str:
        """The line as it can be written there: what has no character of its own is replaced, what is too long is cut,
        and ends with a sign of that."""
        parts = [(line, "")] if isinstance(line, str) else line
        parts = [(self._possible(text), colour) for text, colour in parts]
        if sum(len(text) for text, _ in parts) > self.width:
            parts = [*_first(parts, self.width - 1), (self._possible(CUT), "")]
        return "".join(_painted(text, colour) if self.colour and colour and text else text for text, colour in parts)

    def _possible(self, text: str) -> str:
        """A text without control characters, and of the characters that the encoding has."""
        text = "".join(char if char.isprintable() else "?" for char in text)
        try:
            f"{CUT}█⣿".encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(_PLAIN)
        return text.encode(self.encoding, "replace").decode(self.encoding)


def terminal_of(stream: TextIO) -> Terminal:
    """What stands behind a stream now; its user may have asked for no colours (NO_COLOR, https://no-color.org)."""
    size = shutil.get_terminal_size((100, 40))
    colour = can_redraw(stream) and not os.environ.get("NO_COLOR")
    return Terminal(width=size.columns, height=size.lines, colour=colour, encoding=stream.encoding)


def can_redraw(stream: TextIO) -> bool:
    """Whether it is a terminal that knows control sequences."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _first(parts: Sequence[tuple[str, str]], room: int) -> list[tuple[str, str]]:
    kept = []
    for text, colour in parts:
        kept.append((text[:room], colour))
        room -= len(kept[-1][0])
    return kept


def _painted(text: str, colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"\x1b[38;2;{red};{green};{blue}m{text}\x1b[0m"
