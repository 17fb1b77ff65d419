"""Files on a disk of this machine, read with `pread`.

That has no shared position, so descriptors may be used by threads and inherited by a fork. A small least-recently-used
set of them is kept open per process, because opening is a round trip on a network disk. A file that was replaced under
its name is opened anew. What is no regular file is refused: a pipe would be waited for without end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm_train.data.files import Range, Stat

_MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk of this machine."""

    location: str

    @property
    def name(self) -> str:
        """The last component of the path."""
        return os.path.basename(self.location)

    def stat(self) -> Stat:
        """Size, and the time of the last modification in nanoseconds."""
        facts = os.stat(self.location)
        _require_regular(facts, self.location)
        return Stat(size=facts.st_size, version=str(facts.st_mtime_ns))

    def read(self, offset: int, length: int) -> bytes:
        """Exactly that range, shorter only at the end of the file."""
        return self.read_many([(offset, length)])[0]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The ranges in the order asked."""
        descriptor = _descriptor(self.location)
        try:
            return [read_fully(descriptor.number, offset, length) for offset, length in ranges]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.location) from error


def regular(path: str, flags: int) -> int:
    """Opens a regular file; an `opener` for `open`.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    flags |= os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)  # or opening a pipe waits for its writer
    except BlockingIOError:  # a regular file that a server of files has lent to somebody, and takes back meanwhile
        descriptor = os.open(path, flags)
    try:
        _require_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def printable(name: str) -> str:
    """A text of UTF-8 for a name that may be none: a file's may have any bytes, which Python shows as half surrogate
    pairs."""
    return name.encode("utf-8", "backslashreplace").decode()


def _require_regular(facts: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)


def read_fully(descriptor: int, offset: int, length: int) -> bytes:
    """`pread` until the length is there or the file ends: one call may return less."""
    chunk = os.pread(descriptor, length, offset)
    if len(chunk) == length:
        return chunk
    chunks = [chunk]
    while chunk and (length := length - len(chunk)):
        offset += len(chunk)
        chunk = os.pread(descriptor, length, offset)
        chunks.append(chunk)
    return b"".join(chunks)


class _Descriptor:
    """An open file, closed when the last thread that uses it lets go."""

    def __init__(self, path: str) -> None:
        self.number = regular(path, os.O_RDONLY)
        facts = os.fstat(self.number)
        self.inode = (facts.st_dev, facts.st_ino)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


_open_files: OrderedDict[str, _Descriptor] = OrderedDict()


def _descriptor(path: str) -> _Descriptor:
    facts = os.stat(path)
    known = _open_files.pop(path, None)
    if known is None or known.inode != (facts.st_dev, facts.st_ino):
        known = _Descriptor(path)
    _open_files[path] = known
    while len(_open_files) > _MAX_OPEN_FILES:
        try:
            _open_files.popitem(last=False)
        except KeyError:  # another thread was faster
            break
    return known
