"""The exceptions a user can meet. Each message says what happened, what was got, what is allowed, and what to do.

`exit_code` is what the command line returns: 2 for a user's mistake, 1 for a failure of the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmError(Exception):
    """Base of every error that vlm-train raises on purpose.

    Args:
        what: one sentence, what went wrong and where.
        got: the offending value.
        allowed: what would have been accepted.
        remedy: the command, key or value that mends it.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, allowed: object = None, remedy: str | None = None) -> None:
        self.what, self.got, self.allowed, self.remedy = what, got, allowed, remedy
        super().__init__(self.render())

    def render(self) -> str:
        """The message as the user reads it, one labelled line per part that is known."""
        lines = [self.what]
        lines += [f"  got:     {self.got}"] if self.got is not None else []
        lines += [f"  allowed: {self.allowed}"] if self.allowed is not None else []
        lines += [f"  remedy:  {self.remedy}"] if self.remedy is not None else []
        return "\n".join(lines)

    def __reduce__(self):  # worker processes send exceptions by pickle; the default would lose the keyword parts
        return _rebuild, (type(self), self.what, self.got, self.allowed, self.remedy)


def reader_killed(process: object) -> VlmError:
    """A worker of a loader is gone; `process`: its id, or several."""
    return VlmError(f"a process that reads data was killed: process {process}",
                    remedy="where memory ran out, `dmesg` says so: data.num_workers=N with fewer; the same command "
                    "resumes")  # fmt: skip


def _rebuild(kind: type[VlmError], what: str, got: object, allowed: object, remedy: str | None) -> VlmError:
    return kind(what, got=got, allowed=allowed, remedy=remedy)


class ConfigError(VlmError):
    """A key, choice or combination that cannot be run. Always the user's to mend."""

    exit_code = 2


class DataError(VlmError):
    """A dataset that is missing, empty, unreadable, or has more bad samples than the configured rate allows."""

    exit_code = 2


class CheckpointError(VlmError):
    """A checkpoint that is missing, incomplete, fails its checksum or does not belong to this run."""

    exit_code = 1


def nearest(word: str, candidates: Iterable[str], num: int = 3) -> list[str]:
    """The candidates most like `word`, best first; by whole word, then by the part after the last dot."""
    pool = sorted(set(candidates))
    close = difflib.get_close_matches(word, pool, n=num, cutoff=0.6)
    if not close:
        tails = {name.rsplit(".", 1)[-1]: name for name in pool}
        close = [tails[tail] for tail in difflib.get_close_matches(word.rsplit(".", 1)[-1], tails, n=num, cutoff=0.6)]
    return close
