"""How long work shows its progress."""

from __future__ import annotations

import sys
import time


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
