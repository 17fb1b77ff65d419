"""One entry of the shard cache: a sparse file with bytes of a shard at their own offsets, and which of them are there.

Behind the shard, from the next page on, stands a table of (start, end). A row is written after its bytes are on the
disk, so bytes that no row names do not count, whatever ended the process that fetched them; and since one file holds
both, they cannot disagree.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.files import Range
from vlm_train.data.local import read_fully
from vlm_train.data.ranges import held

PAGE = 4096

_ROW = np.dtype("<u8")
_POLL = 0.05
_RECENT = 60.0  # seconds for which an entry need not be marked as used again


class DiskError(Exception):
    """An error of the local disk."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def on_disk() -> Iterator[None]:
    """Marks an error of the local disk, which the server's must not be mistaken for."""
    try:
        yield
    except OSError as error:
        raise DiskError(error) from error


@contextmanager
def locked(path: Path, seconds: float, is_there: Callable[[], bool]) -> Iterator[int | None]:
    """The entry, open and locked for fetching; None when another process has fetched, or is at it for too long."""
    deadline = time.monotonic() + seconds
    descriptor = None
    while descriptor is None:
        with on_disk():
            descriptor = _try_lock(path, create=True)
        if descriptor is None and (is_there() or time.monotonic() > deadline):
            yield None
            return
        if descriptor is None:
            time.sleep(_POLL)
    try:
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a process forked meanwhile has the descriptor, too
        os.close(descriptor)


def _try_lock(path: Path, *, create: bool) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else it was removed before we had the lock
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def remove_unlocked(path: Path) -> bool:
    """Removes an entry that nobody is fetching. Reading it does not matter: an open file outlives its name."""
    try:
        descriptor = _try_lock(path, create=False)
    except OSError as error:  # another process removed it, or it is another user's
        return isinstance(error, FileNotFoundError)
    if descriptor is None:
        return False
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return True


def read_entry(path: Path, size: int, wanted: Sequence[Range]) -> list[bytes | None]:
    """What the entry has of the wanted ranges."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return [None] * len(wanted)
    try:
        if time.time() - os.fstat(descriptor).st_mtime > _RECENT:
            os.utime(descriptor)
        there = held(wanted, table(descriptor, size))
        return [read_fully(descriptor, *item) if ok else None for item, ok in zip(wanted, there, strict=True)]
    except OSError:  # the server has it
        return [None] * len(wanted)
    finally:
        os.close(descriptor)


def has(path: Path, size: int, wanted: Sequence[Range]) -> bool:
    """Whether the entry has all of the wanted ranges."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return bool(held(wanted, table(descriptor, size)).all())
    finally:
        os.close(descriptor)


def table(descriptor: int, size: int) -> NDArray[np.uint64]:
    """The rows (start, end) behind a shard of `size` bytes, [N, 2]. A last row that is not whole does not count."""
    start = pages(size)
    content = read_fully(descriptor, start, max(0, os.fstat(descriptor).st_size - start))
    rows = np.frombuffer(content[: len(content) // 16 * 16], _ROW).reshape(-1, 2)
    return rows[(rows[:, 0] < rows[:, 1]) & (rows[:, 1] <= size)]


def append(descriptor: int, size: int, ranges: Sequence[Range]) -> None:
    """Says that these ranges are there. Their bytes must be on the disk before."""
    start = pages(size)
    num_rows = max(0, os.fstat(descriptor).st_size - start) // 16
    rows = np.array([(offset, offset + length) for offset, length in ranges], _ROW)
    _write_fully(descriptor, start + 16 * num_rows, rows.tobytes())


def write(descriptor: int, offset: int, data: bytes) -> None:
    """Puts bytes of the shard at their place."""
    with on_disk():
        _write_fully(descriptor, offset, data)


def _write_fully(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        offset, view = offset + count, view[count:]


def pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def disk_bytes(facts: os.stat_result) -> int:
    """What a sparse file really takes."""
    return facts.st_blocks * 512
