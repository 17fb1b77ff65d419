"""Words and options of the data verbs, and how long work shows its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from vlm_train.errors import ConfigError, nearest

Action = Callable[[list[str]], int | None]
"""What a word of the command line does with the words after it; returns the exit code, None for 0."""


def arguments(
    words: list[str], names: list[str], options: dict[str, Any], *, many: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """Positional words by name and `--option value` or `--option=value`, converted to the type of the default.

    `many`: the last of `names` may be given more than once.

    Raises:
        ConfigError: an option that is not there or has no such value, too few words or too many.
    """
    values, given, rest = dict(options), [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            given.append(word)
            continue
        name, separator, text = word.partition("=")
        if name not in options:
            close = nearest(name, options)
            raise ConfigError(
                "no such option", got=name, allowed=", ".join(options), remedy=close[0] if close else None
            )
        text = text if separator else (rest.pop(0) if rest else "")
        try:
            values[name] = type(options[name])(text)
        except ValueError as error:
            raise ConfigError(f"{name} wants {type(options[name]).__name__}", got=repr(text)) from error
    if len(given) < len(names) or (len(given) > len(names) and not many):
        raise ConfigError("wrong number of words", got=" ".join(given) or "none", allowed=" ".join(names),
                          remedy="vlm-train data --help")  # fmt: skip
    return given, values


class Ticker:
    """Progress of a countable task: one line on a terminal, one line each 30 seconds in a log."""

    def __init__(self, noun: str) -> None:
        self.noun, self.is_terminal, self._last = noun, sys.stderr.isatty(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Shows `done` of `total` if it is time to."""
        now = time.monotonic()
        if now - self._last < (0.2 if self.is_terminal else 30.0) and not (self.is_terminal and done == total):
            return
        self._last = now
        line = f"{done}/{total} {self.noun}"
        print(
            f"\r\x1b[K{line}" if self.is_terminal else line,
            end="\n" if not self.is_terminal or done == total else "",
            file=sys.stderr,
            flush=True,
        )
