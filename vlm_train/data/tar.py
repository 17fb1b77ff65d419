"""Where every sample of a plain tar lies, found from the headers alone.

A WebDataset shard is a tar in which adjacent members that share a key form one sample; the key is the member's path up
to the FIRST dot of its base name (directory kept) and the rest, lower-cased, names the part. One walk over the 512-byte
headers gives each sample a byte range [offset, offset + length) that a single `pread` can fetch later, and the same
walk over those bytes (`read_parts`) gives the parts back, so the index and the reader cannot disagree.

Only names, sizes and offsets are taken from a tar: nothing is extracted, and no member's path ever touches the disk.
Formats: v7, ustar, GNU long names, PAX (POSIX.1-2001). Links, devices, directories, sparse and pickle members are
ignored and counted. A damaged sample is recorded with its reason and does not disturb the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_train.errors import DataError

_BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20  # a name longer than this is an attack or damage, and would be held in memory
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, fifos: their size means nothing
_PICKLES = ("pickle", "pkl", "pyd", "pt", "pth")
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$", re.DOTALL)


class TarFormatError(ValueError):
    """The bytes are not the tar they should be. `reason`: `truncated`, `no_end_marker` or `bad_header`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True, slots=True)
class Member:
    """One tar member. `offset`: its first header (a long-name header included); `data_offset`, `size`: its content."""

    name: str
    offset: int
    data_offset: int
    size: int
    regular: bool


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a sample: name (`jpg`, `0.jpg`, `txt`), where its content starts in the tar, size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class TarSample:
    """One sample: bytes [offset, offset + length) of the tar hold all its parts, headers included."""

    key: str
    offset: int
    length: int = 0
    parts: list[Part] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Appends a part and stretches the range to its end."""
        self.parts.append(part)
        self.length = part.offset + part.size - self.offset


@dataclass(slots=True)
class TarIndex:
    """What a tar holds. `errors`: {shard, key, reason} per sample that is left out; `num_ignored`: members left out."""

    samples: list[TarSample] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    num_ignored: int = 0


def split_name(name: str) -> tuple[str, str] | None:
    """(key, part name) of a member's path, None when it has no extension or its base name starts with a dot."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def index_tar(path: Path) -> TarIndex:
    """Indexes a tar without reading the content of its members.

    Raises:
        DataError: the tar is compressed (no random access), or holds no usable sample at all.
    """
    index = TarIndex()
    with open(path, "rb", buffering=0) as file:
        _refuse_compressed(path, file.read(8))
        size = os.fstat(file.fileno()).st_size
        members = _walk(lambda offset, num: os.pread(file.fileno(), num, offset), size, closed=True)
        samples = _group(members, index, path.name)
    seen: set[str] = set()
    for sample in samples:
        reason = "duplicate_key" if sample.key in seen else None
        seen.add(sample.key)
        if reason is None and any(part.size == 0 for part in sample.parts):
            reason = "empty_member"
        if reason is None:
            index.samples.append(sample)
        else:
            index.errors.append({"shard": path.name, "key": sample.key, "reason": reason})
    if not index.samples:
        raise no_usable_sample(path, index.errors, index.num_ignored)
    return index


def no_usable_sample(path: Path, errors: list[dict[str, str]], num_ignored: int) -> DataError:
    """The error for a tar that gives nothing to train on."""
    found = ", ".join(f"{error['key'] or '(start)'}: {error['reason']}" for error in errors[:5])
    return DataError(
        f"shard `{path}` holds no usable sample",
        got=found or f"{num_ignored} members, none of them a part of a sample",
        allowed="adjacent members KEY.jpg|png|webp and KEY.txt or KEY.json",
        remedy="remove the shard from the list, or write it again with img2dataset or `vlm-train data import`",
    )


def read_parts(chunk: bytes) -> tuple[str, dict[str, bytes]]:
    """(key, content by part name) of one sample from its byte range.

    Raises:
        TarFormatError: the bytes are not the headers and content of exactly one sample.
    """
    key, parts = None, {}
    for member in _walk(lambda offset, num: chunk[offset : offset + num], len(chunk), closed=False):
        names = _part_name(member)
        if names is None:
            continue
        if key not in (None, names[0]) or names[1] in parts:
            raise TarFormatError("bad_header", f"member `{member.name}` does not belong to sample `{key}`")
        key = names[0]
        parts[names[1]] = chunk[member.data_offset : member.data_offset + member.size]
    if key is None:
        raise TarFormatError("bad_header", "no member of a sample")
    return key, parts


def _refuse_compressed(path: Path, magic: bytes) -> None:
    for prefix, command in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise DataError(
                f"shard `{path}` is compressed, so its samples cannot be read at random",
                allowed="a plain .tar (images inside are compressed already)",
                remedy=f"unpack it once: `{command} {path.name}`",
            )


def _part_name(member: Member) -> tuple[str, str] | None:
    names = split_name(member.name) if member.regular else None
    return None if names is None or names[1].rsplit(".", 1)[-1] in _PICKLES else names


def _group(members: Iterator[Member], index: TarIndex, shard: str) -> list[TarSample]:
    """Adjacent members of one key become a sample; a part name seen twice starts a new sample of the same key.

    The sample at which a tar breaks off is left out: nobody can know whether it was whole.
    """
    samples: list[TarSample] = []
    try:
        for member in members:
            names = _part_name(member)
            if names is None:
                index.num_ignored += 1
                continue
            key, part = names
            if not samples or samples[-1].key != key or any(part == known.name for known in samples[-1].parts):
                samples.append(TarSample(key, member.offset))
            samples[-1].add(Part(part, member.data_offset, member.size))
    except TarFormatError as error:
        last = samples.pop().key if samples else ""
        index.errors.append({"shard": shard, "key": last, "reason": error.reason})
    return samples


def _walk(read: Callable[[int, int], bytes], end: int, *, closed: bool) -> Iterator[Member]:
    """Members in file order. `closed`: the bytes are a whole archive, which must finish with a block of zeros."""
    offset = first = 0
    extended: dict[str, Any] = {}
    while offset < end:
        header = read(offset, _BLOCK)
        if not any(header):
            return
        size, kind = _check(header, offset), header[156:157]
        size = 0 if kind in _WITHOUT_DATA else extended.get("size", size)
        data = offset + _BLOCK
        if data + size > end:
            # the member is named so that its sample, not the one before it, is the one reported
            yield Member(extended.get("path") or _name(header), first, data, size, kind in _REGULAR)
            raise TarFormatError("truncated", f"a member at byte {offset} ends at {data + size} of {end}")
        offset = data + -(-size // _BLOCK) * _BLOCK
        if kind in (b"x", b"L", b"K", b"g"):
            extended |= _extended(kind, read, data, size)
            continue
        name = extended.get("path") or _name(header)
        yield Member(name, first, data, size, kind in _REGULAR and not name.endswith("/") and "sparse" not in extended)
        first, extended = offset, {}
    if closed:
        raise TarFormatError("no_end_marker", f"the archive stops at byte {end} without a closing block")


def _check(header: bytes, offset: int) -> int:
    """The size field of a header whose checksum holds."""
    if len(header) < _BLOCK:
        raise TarFormatError("truncated", f"{len(header)} bytes of a header at byte {offset}")
    try:
        total, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        raise TarFormatError("bad_header", f"not a number in the header at byte {offset}") from None
    if total != sum(header) - sum(header[148:156]) + 8 * ord(" ") or size < 0:
        raise TarFormatError("bad_header", f"checksum of the header at byte {offset}")
    return size


def _number(raw: bytes) -> int:
    """Octal digits, or big-endian binary when the top bit is set (GNU, for sizes of 8 GiB and more)."""
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")  # lossless, and valid in a Parquet string column


def _extended(kind: bytes, read: Callable[[int, int], bytes], data: int, size: int) -> dict[str, Any]:
    """What a long-name (`L`) or PAX (`x`) header says about the member after it."""
    if kind in (b"K", b"g"):  # a long link target, defaults of the archive: neither names a member
        return {}
    if size > _MAX_EXTENDED_HEADER:
        raise TarFormatError("bad_header", f"an extended header of {size} bytes")
    raw = read(data, size)
    if kind == b"L":
        return {"path": _text(raw.split(b"\0", 1)[0])}
    found: dict[str, Any] = {}
    try:
        while raw.strip(b"\0"):
            length = int(raw[: raw.index(b" ")])
            if not 0 < length <= len(raw):
                raise ValueError
            keyword, value = raw[raw.index(b" ") + 1 : length - 1].split(b"=", 1)
            raw = raw[length:]
            found |= _pax(keyword, value)
    except ValueError:
        raise TarFormatError("bad_header", "a PAX record that cannot be read") from None
    return found


def _pax(keyword: bytes, value: bytes) -> dict[str, Any]:
    if keyword.startswith(b"GNU.sparse"):
        return {"sparse": True}
    if keyword == b"path":
        return {"path": _text(value)}
    return {"size": int(value)} if keyword == b"size" else {}
