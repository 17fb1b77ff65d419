"""Shards of servers, kept on the local disk up to a limit, shared by all processes of a machine.

An entry (`entries.py`) is a sparse file, named by a hash of location, version and size: a changed object is another.

Who fetches holds a lock on the entry; the others wait and take the bytes from there. The disk space is taken, under a
lock on the folder, before the bytes are asked for, and the entries used least recently make room: so the limit holds
while fetching, too. An entry that somebody reads may go, for an open file outlives its name; one that is being fetched
does not. Whatever the cache cannot do, because the disk is full or may not be written, is read from the server.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from vlm_train.assets import cache_dir
from vlm_train.data import entries
from vlm_train.data.entries import DiskError, disk_bytes, on_disk, pages
from vlm_train.data.files import Range, Stat
from vlm_train.data.ranges import batches, clamp, coalesce, held, split, union
from vlm_train.data.remote import PIECE, RemoteFile
from vlm_train.locations import identity
from vlm_train.log import get_logger

log = get_logger(__name__)

BATCH = 64 * 1024 * 1024
"""Bytes that are fetched together: the grain of waiting, of making room and of what a killed process loses."""

_REST = 60.0  # seconds without a further try after there was no room


class ShardCache:
    """The folder and its limit.

    Args:
        limit: bytes on the disk.
        folder: default `shards` in the user's cache (`assets.cache_dir`).
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit = limit
        self.folder = folder or cache_dir() / "shards"

    def path(self, location: str, stat: Stat) -> Path:
        """Where the entry of one version of one shard lies."""
        words = "\0".join((identity(location), stat.version, str(stat.size)))
        return self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.shard"

    def take_room(self, descriptor: int, ranges: Sequence[Range]) -> bool:
        """Disk space for these ranges of an entry that the caller has locked; False where nothing can make room.

        Raises:
            OSError: the disk is full.
        """
        need = pages(16 * len(ranges)) + sum(pages(length) + entries.PAGE for _, length in ranges)
        with self._lock():
            known = sorted(self._entries(), key=lambda entry: entry[1].st_mtime_ns)
            used = sum(disk_bytes(facts) for _, facts in known)
            for path, facts in known:
                if used + need <= self.limit:
                    break
                used -= disk_bytes(facts) if entries.remove_unlocked(path) else 0
            if used + need > self.limit:
                return False
            for offset, length in ranges:
                os.posix_fallocate(descriptor, offset, length)
        return True

    def used(self) -> int:
        """Bytes that all entries take on the disk, at one moment."""
        with self._lock():
            return sum(disk_bytes(facts) for _, facts in self._entries())

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(".shard"):
                    yield Path(entry.path), entry.stat()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.folder / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


class CachedFile:
    """A file on a server whose bytes are kept.

    Args:
        remote: where they come from.
        cache: where they go to.
        kept: gives the ranges that will be read, see `storage.open_file`.
        window_bytes: what the shards that are read in turn need together; 0 is not known.
    """

    def __init__(
        self,
        remote: RemoteFile,
        cache: ShardCache,
        *,
        kept: Callable[[], Sequence[Range]] | None = None,
        window_bytes: int = 0,
    ) -> None:
        self.remote, self.cache = remote, cache
        self._kept, self._window_bytes = kept, window_bytes
        self._plan: list[list[Range]] | None = None  # what is fetched together, in order of offset
        self._rest_until = 0.0

    @property
    def location(self) -> str:
        """The URL."""
        return self.remote.location

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.remote.name

    def stat(self) -> Stat:
        """As the server says now. Another version is another entry from here on."""
        before, now = self.remote.known, self.remote.stat()
        if now != before:
            self._plan = None
        return now

    def read(self, offset: int, length: int) -> bytes:
        """Exactly that range, shorter only at the end of the file."""
        return self.read_many([(offset, length)])[0]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The ranges in the order asked: from the disk, after fetching what the plan says; else from the server."""
        stat = self.remote.known or self.stat()
        wanted = clamp(ranges, stat.size)
        path = self.cache.path(self.location, stat)
        found = entries.read_entry(path, stat.size, wanted)
        if None in found:
            self._fetch(path, stat, wanted)
            found = entries.read_entry(path, stat.size, wanted)
        absent = iter(self.remote.read_many([item for item, data in zip(wanted, found, strict=True) if data is None]))
        return [next(absent) if data is None else data for data in found]

    def _fetch(self, path: Path, stat: Stat, wanted: Sequence[Range]) -> None:
        """Fetches the batches that the wanted ranges lie in, as far as the cache has room for them."""
        if time.monotonic() < self._rest_until:
            return
        groups, wanted = _touched(self._batches(stat), wanted)
        if not groups:
            return
        try:
            with on_disk():
                self.cache.folder.mkdir(parents=True, exist_ok=True)
            patience = self.remote.options.retry_seconds
            with entries.locked(path, patience, lambda: entries.has(path, stat.size, wanted)) as descriptor:
                while descriptor is not None and groups and self._fetch_batch(descriptor, path, stat, groups.pop(0)):
                    pass
        except DiskError as failure:
            _warn_once(self.cache.folder, failure.error)
            self._rest_until = time.monotonic() + _REST

    def _fetch_batch(self, descriptor: int, path: Path, stat: Stat, group: list[Range]) -> bool:
        """False where there is no room, or the shard was replaced."""
        with on_disk():
            there = held(group, entries.table(descriptor, stat.size))
        missing = [item for item, is_there in zip(group, there, strict=True) if not is_there]
        if not missing:
            return True
        with on_disk():
            if not self.cache.take_room(descriptor, missing):
                self._rest_until = time.monotonic() + _REST
                return False
        self.remote.fetch(missing, lambda offset, data: entries.write(descriptor, offset, data))
        if self.remote.stat() != stat:  # replaced meanwhile: these may be bytes of either version
            path.unlink(missing_ok=True)
            self._plan = None
            return False
        with on_disk():
            os.fdatasync(descriptor)
            entries.append(descriptor, stat.size, union(missing))
        return True

    def _batches(self, stat: Stat) -> list[list[Range]]:
        """The shard, or the kept ranges where they are less than half of it; nothing where the cache is too small."""
        if self._plan is None:
            kept = clamp(self._kept(), stat.size) if self._kept else [(0, stat.size)]
            num_kept = sum(length for _, length in union(kept))
            requests = [(0, stat.size)] if 2 * num_kept >= stat.size else coalesce(kept)
            need = max(self._window_bytes, sum(length for _, length in requests))
            fits = need <= self.cache.limit
            self._plan = list(batches(split(requests, PIECE), BATCH)) if fits else []
        return self._plan


def _touched(plan: list[list[Range]], wanted: Sequence[Range]) -> tuple[list[list[Range]], list[Range]]:
    """The batches that the wanted ranges lie in, and those ranges that the plan has."""
    rows = [(offset, offset + length) for group in plan for offset, length in group]
    planned = held(wanted, np.array(rows, np.uint64).reshape(-1, 2))
    wanted = [item for item, is_planned in zip(wanted, planned, strict=True) if is_planned and item[1]]
    starts = [group[0][0] for group in plan]
    numbers: set[int] = set()
    for offset, length in wanted:
        numbers |= set(range(bisect_right(starts, offset) - 1, bisect_right(starts, offset + length - 1)))
    return [plan[number] for number in sorted(numbers)], wanted


_warned: set[int] = set()


def _warn_once(folder: Path, error: OSError) -> None:
    if error.errno not in _warned:
        _warned.add(error.errno or 0)
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        log.warning("shards are read from the server without the cache in %s: %s", folder, reason)
