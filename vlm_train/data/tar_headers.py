"""What one header of a tar says: its numbers, names and records, and whether it is whole.

Dialects: v7, ustar, GNU, PAX (POSIX.1-2001), and PAX as Solaris wrote it. Numbers are believed only within bounds: a
size is never negative and always below 2^63.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

BLOCK = 512
WITHOUT_DATA = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "directory", b"6": "device"}
"""Types of member that are a header alone, and what they are called."""

_MAX_SIZE = (1 << 63) - 1
_REGULAR = (b"0", b"\0", b"7")
_TYPES = frozenset(b"\x0001234567DKLMNSVXgx")  # all that the dialects define
_OCTAL = re.compile(rb" *([0-7]*)(?:[ \0].*)?", re.DOTALL)
_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_ADLER = 65521
_V7_REST = bytes(BLOCK - 257)  # what v7 has where the later dialects say which they are


class TarFormatError(ValueError):
    """The bytes are not the tar they should be. `reason`: `truncated`, `no_end_marker` or `bad_header`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def size_in(header: bytes, offset: int) -> int:
    """The size field of a header. Raises TarFormatError unless the header is whole and its checksum holds."""
    if len(header) < BLOCK:
        raise TarFormatError("truncated", f"{len(header)} bytes of a header at byte {offset}")
    try:
        total, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        raise TarFormatError("bad_header", f"not a number in the header at byte {offset}") from None
    # the checksum is the sum of the bytes, its own field taken as spaces; the low half of Adler-32 is 1 + that sum,
    # modulo 65,521, and ten times as fast as `sum`
    summed = header[:148] + b"        " + header[156:]
    holds = total <= 255 * BLOCK and (total + 1) % _ADLER == zlib.adler32(summed) & 0xFFFF
    if not holds and total != sum(memoryview(summed).cast("b")):  # some old writers took bytes for signed
        raise TarFormatError("bad_header", f"checksum of the header at byte {offset}")
    return size


def is_header(block: bytes) -> bool:
    """Stricter than what is taken where a header is expected: the content of a file must not pass for one."""
    if not block[0] or (block[257:262] != b"ustar" and block[257:] != _V7_REST) or block[156] not in _TYPES:
        return False
    try:
        return size_in(block, 0) >= 0
    except TarFormatError:
        return False


def kind_in(header: bytes, said: dict[str, Any]) -> str:
    """`file`, or what else a member is; `said`: what the headers before this one say about it."""
    kind = header[156:157]
    if kind in _REGULAR:
        name = said.get("path") or header[:100].split(b"\0", 1)[0].decode("latin1")
        return "sparse" if "sparse" in said else "directory" if name.endswith("/") else "file"
    return "sparse" if kind == b"S" else WITHOUT_DATA.get(kind, "unknown")


def name_in(header: bytes) -> str:
    """The path that a header has room for."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def long_name(content: bytes) -> dict[str, Any]:
    """What a GNU long-name header says about the member after it."""
    return {"path": _text(content.split(b"\0", 1)[0])}


def records(content: bytes) -> dict[str, Any]:
    """What PAX records (`LENGTH KEYWORD=VALUE\\n`) say about the member after them: `path`, `size`, `sparse`.

    Raises:
        TarFormatError: a record that cannot be read.
    """
    said: dict[str, Any] = {}
    start = 0
    try:
        while start < len(content) and content[start]:
            record = _RECORD.match(content, start)
            stop = start + int(record[1]) if record else 0
            if record is None or not record.end() < stop <= len(content) or content[stop - 1 : stop] != b"\n":
                raise ValueError
            said |= _record(record[2], content[record.end() : stop - 1])
            start = stop
    except ValueError:
        raise TarFormatError("bad_header", "a PAX record that cannot be read") from None
    if content[start:].strip(b"\0"):
        raise TarFormatError("bad_header", "something after the last PAX record")
    return said


def _record(keyword: bytes, value: bytes) -> dict[str, Any]:
    if keyword.startswith(b"GNU.sparse"):
        return {"sparse": True}
    if keyword == b"path":
        return {"path": _text(value)}
    if keyword == b"size" and value:
        if not value.isdigit():
            raise ValueError(value)
        return {"size": _bounded(int(value))}
    return {}


def _number(raw: bytes) -> int:
    """Octal digits, or big-endian binary when the top bit is set (GNU, for sizes of 8 GiB and more)."""
    octal = _OCTAL.fullmatch(raw)
    if octal is not None:
        return int(octal[1] or b"0", 8)
    if raw[0] != 0x80:  # 0xff begins a negative number
        raise ValueError(raw)
    return _bounded(int.from_bytes(raw[1:], "big"))


def _bounded(size: int) -> int:
    if size > _MAX_SIZE:
        raise ValueError(size)
    return size


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")  # lossless, and valid in a Parquet string column
