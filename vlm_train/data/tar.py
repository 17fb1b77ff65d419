"""The members of a plain tar, found from the headers alone.

Only names, sizes and offsets are taken from a tar: nothing is extracted, and no member's path ever touches the disk.
Dialects: v7, ustar, GNU long names, PAX (POSIX.1-2001). A header that is damaged is passed over to the next one that is
whole, so that one bad block costs the sample it lies in and not the rest of the shard. Two blocks of zeros end a tar,
but what follows them is looked at: tars may be joined end to end, and zeros may be damage.

The same walk finds the samples of a shard when it is indexed or streamed and the parts of one sample when it is read,
so these cannot disagree. It asks for bytes in ascending order only, and each turn of it takes it at least a block on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vlm_train.data.tar_headers import (
    BLOCK,
    WITHOUT_DATA,
    TarFormatError,
    is_header,
    kind_in,
    long_name,
    name_in,
    records,
    size_in,
)

_FIRST_SCAN, _LAST_SCAN = 1 << 14, 1 << 20
_MAX_EXTENDED_HEADER = 1 << 20  # a name longer than this is an attack or damage, and would be held in memory
_EXTENDED = (b"x", b"X", b"L", b"K", b"g")  # say something about the member after them; X: PAX as Solaris wrote it
_PICKLES = ("pickle", "pkl", "pyd", "pt", "pth")
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$", re.DOTALL)

Read = Callable[[int, int], bytes]
"""(offset, number of bytes) -> those bytes, fewer only at the end."""


class Member(NamedTuple):
    """One tar member. `offset`: its first header (a long-name header included); `data_offset`, `size`: its content;
    `kind`: `file`, or what else it is: link, device, directory, sparse, unknown; or what is no member, but stands
    between or after them: `end_marker` (a tar ends, and another begins) and `garbage` (after the end)."""

    name: str
    offset: int
    data_offset: int
    size: int
    kind: str


class Damage(NamedTuple):
    """A place where the walk met something that is no tar. `reason` and `detail` as in TarFormatError."""

    reason: str
    detail: str


def split_name(name: str) -> tuple[str, str] | None:
    """(key, part name) of a member's path, None when it has no extension or its base name starts with a dot.

    The key ends at the FIRST dot of the base name, as WebDataset has it; the directory belongs to it.
    """
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def part_of(member: Member) -> tuple[str, str] | str:
    """(key, part name) of a member that is a part of a sample; else what it is: `link`, `pickle`, `unnamed`, ..."""
    if member.kind != "file":
        return member.kind
    names = split_name(member.name)
    if names is None:
        return "unnamed"
    return "pickle" if names[1].rsplit(".", 1)[-1] in _PICKLES else names


def read_parts(chunk: bytes) -> tuple[str, dict[str, bytes]]:
    """(key, content by part name) of one sample from its byte range.

    Raises:
        TarFormatError: the bytes are not the headers and content of exactly one sample.
    """
    key, parts = None, {}
    for member in walk(lambda offset, num: chunk[offset : offset + num], len(chunk), whole=False):
        if isinstance(member, Damage):
            raise TarFormatError(*member)
        names = part_of(member)
        if isinstance(names, str):
            continue
        if key not in (None, names[0]) or names[1] in parts:
            raise TarFormatError("bad_header", f"member `{member.name}` does not belong to sample `{key}`")
        key = names[0]
        parts[names[1]] = chunk[member.data_offset : member.data_offset + member.size]
    if key is None:
        raise TarFormatError("bad_header", "no member of a sample")
    return key, parts


def walk(read: Read, end: int | None, *, whole: bool) -> Iterator[Member | Damage]:
    """Members in file order, and what is damaged between them.

    `end`: number of bytes, None for a stream, which ends where a read gives less than was asked for. `whole`: the bytes
    are an archive, which must finish with zeros, and after damage the walk goes on at the next good header; otherwise
    damage ends it. A member that the archive breaks off in comes before the Damage of it.

    The offsets asked for ascend, also those of a consumer who reads a member's content when it is handed the member.
    """
    archive = _Archive(read, end, whole)
    while not archive.over and (whole or archive.reaches(archive.offset + 1)):
        event: Member | Damage | None
        try:
            event = archive.member() or archive.after_zeros()
        except TarFormatError as error:
            event = Damage(error.reason, error.detail)
            if not whole or error.reason != "bad_header":
                archive.over = True
            else:
                archive.find_header(archive.offset + BLOCK)
        if event is not None:
            yield event
        if archive.over or not isinstance(event, Member) or not event.size:
            continue
        if not archive.reaches(event.data_offset + event.size):
            yield Damage("truncated", f"the member at byte {event.offset} is longer than what is left")
            return


class _Archive:
    """Where a walk stands: a header is expected at `offset`, which only grows, unless the archive is `over`."""

    def __init__(self, read: Read, end: int | None, whole: bool) -> None:
        self._source, self._end, self._whole = read, end, whole
        self.offset, self.over = 0, False

    def reaches(self, stop: int) -> bool:
        """Whether the bytes before `stop` are there."""
        return stop <= self._end if self._end is not None else bool(self._source(stop - 1, 1))

    def member(self) -> Member | None:
        """The next member; None where there are zeros instead of a header.

        Raises:
            TarFormatError: there is something else.
        """
        first = self.offset
        said: dict[str, Any] = {}
        while True:
            header, is_first = self._read(self.offset, BLOCK), self.offset == first
            if not header:
                raise TarFormatError("no_end_marker", f"the archive stops at byte {self.offset} without its end")
            if is_first and self._whole and not any(header):
                return None
            size, kind, data = size_in(header, self.offset), header[156:157], self.offset + BLOCK
            if kind not in _EXTENDED:
                break
            said |= self._extended(kind, data, size)
            self.offset = _after(data, size)
        size = 0 if kind in WITHOUT_DATA else said.get("size", size)
        data = self._after_map(header, data) if kind == b"S" else data
        self.offset = _after(data, size)
        return Member(said.get("path") or name_in(header), first, data, size, kind_in(header, said))

    def after_zeros(self) -> Member | Damage | None:
        """What follows the zeros at `offset`: nothing, the next of several tars (`end_marker`), or `garbage`. A single
        block of zeros, or zeros and garbage amid members, are Damage: there were headers."""
        start = self.offset
        self._skip_zeros()
        if self.over:
            return None
        stop = self.offset
        self.find_header(stop)
        if stop - start > BLOCK and self.offset == stop:
            return Member("", start, stop, 0, "end_marker")
        if stop - start > BLOCK and self.over:
            return Member("", start, stop, self.offset - stop, "garbage")
        return Damage("bad_header", f"zeros in place of a header at byte {start}")

    def find_header(self, offset: int) -> None:
        """On to the first header from `offset` on that is whole; where there is none, the archive is over."""
        self.offset = offset
        for blocks in self._onwards():
            for start in range(0, len(blocks) - BLOCK + 1, BLOCK):
                if is_header(blocks[start : start + BLOCK]):
                    self.offset += start
                    return

    def _skip_zeros(self) -> None:
        """On to the first block that is not all zeros."""
        for blocks in self._onwards():
            if blocks != bytes(len(blocks)):
                self.offset += (len(blocks) - len(blocks.lstrip(b"\0"))) // BLOCK * BLOCK
                return

    def _onwards(self) -> Iterator[bytes]:
        """What lies from `offset` on, in pieces that grow: most damage is short. Behind the last, it is over."""
        length = _FIRST_SCAN
        while blocks := self._read(self.offset, length):
            yield blocks
            self.offset += len(blocks)
            length = min(2 * length, _LAST_SCAN)
        self.over = True

    def _extended(self, kind: bytes, data: int, size: int) -> dict[str, Any]:
        """What a long-name (`L`) or PAX (`x`) header says about the member after it."""
        if kind in (b"K", b"g"):  # a long link target, defaults of the archive: neither names a member
            if size and not self.reaches(data + size):
                raise TarFormatError("truncated", f"an extended header at byte {data - BLOCK}")
            return {}
        if size > _MAX_EXTENDED_HEADER:
            raise TarFormatError("bad_header", f"an extended header of {size} bytes")
        raw = self._read(data, size)
        if len(raw) < size:
            raise TarFormatError("truncated", f"an extended header at byte {data - BLOCK}")
        return long_name(raw) if kind == b"L" else records(raw)

    def _after_map(self, header: bytes, data: int) -> int:
        """Where the content of an old GNU sparse file begins: after the blocks that its map goes on in."""
        goes_on = header[482]
        while goes_on:
            block = self._read(data, BLOCK)
            if len(block) < BLOCK:
                raise TarFormatError("truncated", f"the map of a sparse file at byte {data}")
            goes_on, data = block[504], data + BLOCK
        return data

    def _read(self, offset: int, length: int) -> bytes:
        if self._end is not None:
            length = min(length, max(0, self._end - offset))
        return self._source(offset, length) if length else b""


def _after(data: int, size: int) -> int:
    return data + -(-size // BLOCK) * BLOCK
