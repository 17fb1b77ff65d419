"""The members of a plain tar, found from the headers alone.

Only names, sizes and offsets are taken from a tar: nothing is extracted, and no member's path ever touches the disk.
Dialects: v7, ustar, GNU long names, PAX (POSIX.1-2001). A header that is damaged is passed over to the next one whose
checksum holds, so that one bad block costs the sample it lies in and not the rest of the shard.

The same walk finds the samples of a shard when it is indexed and the parts of one sample when it is read, so the two
cannot disagree.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_BLOCK = 512
_SCAN = 1 << 20
_MAX_EXTENDED_HEADER = 1 << 20  # a name longer than this is an attack or damage, and would be held in memory
_KINDS = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "directory", b"6": "device"}  # without data
_REGULAR = (b"0", b"\0", b"7")
_PICKLES = ("pickle", "pkl", "pyd", "pt", "pth")
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$", re.DOTALL)
_ADLER = 65521

Read = Callable[[int, int], bytes]
"""(offset, number of bytes) -> those bytes, fewer only at the end."""


class TarFormatError(ValueError):
    """The bytes are not the tar they should be. `reason`: `truncated`, `no_end_marker` or `bad_header`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class Member(NamedTuple):
    """One tar member. `offset`: its first header (a long-name header included); `data_offset`, `size`: its content;
    `kind`: `file`, or what else it is: link, device, directory, sparse, unknown."""

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


def walk(read: Read, end: int, *, whole: bool) -> Iterator[Member | Damage]:
    """Members in file order, and what is damaged between them.

    `whole`: the bytes are an archive, which must finish with a block of zeros, and after damage the walk goes on at the
    next good header; otherwise damage ends it. A member that the archive breaks off in comes before the Damage of it.
    """
    offset = first = 0
    extended: dict[str, Any] = {}
    while offset < end:
        header = read(offset, _BLOCK)
        if not header:  # a stream, whose end nobody knew
            cut = offset and not read(offset - 1, 1)
            yield Damage("truncated" if cut else "no_end_marker", f"the stream ends before byte {offset}")
            return
        try:
            if not any(header):
                return
            size, kind = _check(header, offset), header[156:157]
            size = 0 if kind in _KINDS else extended.get("size", size)
            data = offset + _BLOCK
            if data + size <= end and kind in b"xLKg" and kind:
                extended |= _extended(kind, read, data, size)
                offset = data + -(-size // _BLOCK) * _BLOCK
                continue
        except TarFormatError as error:
            yield Damage(error.reason, str(error))
            offset = first = _next_header(read, offset + _BLOCK, end) if whole else end
            extended = {}
            if offset >= end:
                return
            continue
        yield Member(extended.get("path") or _name(header), first, data, size, _kind(kind, header, extended))
        if data + size > end:
            yield Damage("truncated", f"a member at byte {offset} ends at {data + size} of {end}")
            return
        offset = first = data + -(-size // _BLOCK) * _BLOCK
        extended = {}
    if whole:
        yield Damage("no_end_marker", f"the archive stops at byte {end} without a closing block")


def _next_header(read: Read, offset: int, end: int) -> int:
    """Where the next block lies that is a header by its magic and its checksum; `end` where there is none."""
    while offset < end:
        blocks = read(offset, _SCAN)
        for start in range(0, len(blocks) - _BLOCK + 1, _BLOCK):
            if blocks[start + 257 : start + 262] == b"ustar" and _holds(blocks[start : start + _BLOCK]):
                return offset + start
        offset += _SCAN
    return end


def _holds(header: bytes) -> bool:
    try:
        return _check(header, 0) >= 0
    except TarFormatError:
        return False


def _kind(kind: bytes, header: bytes, extended: dict[str, Any]) -> str:
    if kind in _REGULAR:
        name = extended.get("path") or header[:100].split(b"\0", 1)[0].decode("latin1")
        return "sparse" if "sparse" in extended else "directory" if name.endswith("/") else "file"
    return _KINDS.get(kind, "unknown")


def _check(header: bytes, offset: int) -> int:
    """The size field of a header whose checksum holds."""
    if len(header) < _BLOCK:
        raise TarFormatError("truncated", f"{len(header)} bytes of a header at byte {offset}")
    try:
        total, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        raise TarFormatError("bad_header", f"not a number in the header at byte {offset}") from None
    # the checksum is the sum of the bytes, its own field taken as spaces; the low half of Adler-32 is 1 + that sum,
    # modulo 65,521, and ten times as fast as `sum`
    found = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
    if (total + 1) % _ADLER != found or not 0 <= total <= 255 * _BLOCK or size < 0:
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


def _extended(kind: bytes, read: Read, data: int, size: int) -> dict[str, Any]:
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
