"""The face that every shard has, on a disk or on a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Range = tuple[int, int]
"""(offset, length) in bytes."""


@dataclass(frozen=True)
class Stat:
    """`size` in bytes; `version` changes when the content changes (time in ns, entity tag, or last modification)."""

    size: int
    version: str


@dataclass(frozen=True)
class StorageOptions:
    """How servers are treated and how much of their shards is kept here. Local files need none of it.

    Args:
        cache_gb: the most that shards of servers take on the local disk, 10^9 bytes; 0 keeps none.
        retry_seconds: how long one read goes on trying when a server does not answer.
        timeout_seconds: how long one request may go without a byte of progress.
    """

    cache_gb: float = 20.0
    retry_seconds: float = 300.0
    timeout_seconds: float = 60.0


class File(Protocol):
    """One shard on a disk or on a server. May be pickled, and used after a fork."""

    @property
    def location(self) -> str:
        """An absolute path, or a URL. It may hold secrets: show `shown(location)`."""

    @property
    def name(self) -> str:
        """The last component of the path."""

    def stat(self) -> Stat:
        """Size and version as they are now. Raises OSError when they cannot be had."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly that range, shorter only at the end of the file. Raises OSError when it cannot be had."""

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """Every (offset, length), in the order asked; neighbours are joined and requests run at once where it pays."""
