"""Plain WebDataset tars, as img2dataset writes them: indexed in one sequential read, read by byte ranges.

Adjacent members that share a key form one sample (`tar.split_name`). The index keeps the byte range of each, headers
included, so reading one takes one request, and the headers in that range give the parts again. The uid computed from
the parts must be the one that was indexed: changed bytes are never trained on under another sample's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from vlm_train.data import decode, tar
from vlm_train.data.decode import SampleError
from vlm_train.data.files import File
from vlm_train.data.formats.base import Parts, ShardIndex, changed
from vlm_train.errors import DataError
from vlm_train.locations import shown
from vlm_train.log import get_logger

log = get_logger(__name__)

_CHUNK = 8 << 20
_MAX_LENGTH = (1 << 31) - (1 << 12)  # the most that one read returns on Linux
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


class TarFormat:
    """Tar shards."""

    def index(self, file: File) -> ShardIndex:
        """See `Format.index`. The samples around damage are left out."""
        _refuse_compressed(file)
        index = ShardIndex(file.name)
        window = _Window(file)
        seen: set[str] = set()
        for number, sample in enumerate(samples(window, file.stat().size, index)):
            reason = unusable(sample, seen)
            seen.add(sample.key)
            if reason:
                index.leave_out(sample.key, reason)
                continue
            index.add(
                sample.contents,
                key=sample.key,
                number=number,
                offset=sample.offset,
                length=sample.length,
                parts=sample.parts,
            )
        return index

    def read(self, file: File, entries: NDArray[Any]) -> list[Parts | SampleError]:
        """See `Format.read`."""
        ranges = list(zip(entries["offset"].tolist(), entries["length"].tolist(), strict=True))
        chunks = file.read_many(ranges)
        uids = entries["uid"].tolist()
        return [_sample(file.name, chunk, uid) for chunk, uid in zip(chunks, uids, strict=True)]


@dataclass(slots=True)
class TarSample:
    """Bytes [offset, offset + length) of the tar hold all parts (name, offset, size), headers included. `contents` has
    the bytes of each by name, unless the sample is too large to be used."""

    key: str
    offset: int
    length: int = 0
    parts: list[tuple[str, int, int]] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)

    def takes(self, key: str, part: str) -> bool:
        """Whether a part belongs to this sample; a name seen twice begins another of the same key."""
        return key == self.key and all(part != known for known, _, _ in self.parts)


class _Window:
    """Sequential reading in large chunks, answering small reads from the last one."""

    def __init__(self, file: File) -> None:
        self.file, self.start, self.chunk = file, 0, b""

    def read(self, offset: int, length: int) -> bytes:
        """As `File.read`. What lies behind the window, or is larger than it, is read for itself."""
        place = offset - self.start
        if place < 0 or length > _CHUNK:
            return self.file.read(offset, length)
        if place + length > len(self.chunk):
            self.start, self.chunk, place = offset, self.file.read(offset, _CHUNK), 0
        return self.chunk[place : place + length]


class Readable(Protocol):
    """Bytes by place."""

    def read(self, offset: int, length: int) -> bytes:
        """Those bytes, fewer only at the end."""


def samples(window: Readable, end: int | None, index: ShardIndex) -> Iterator[TarSample]:
    """Samples in file order, read as they pass by. `end` as in `tar.walk`.

    Damage goes to the index, with the samples before and after it: nobody can know whether they were whole.
    """
    sample: TarSample | None = None
    doubtful: str | None = None  # the damage that the sample being gathered may have lost a part to
    for member in tar.walk(window.read, end, whole=True):
        if isinstance(member, tar.Damage):
            index.leave_out(sample.key if sample else "", member.reason)
            sample, doubtful = None, member.reason
            continue
        names = tar.part_of(member)
        is_other = isinstance(names, tuple) and sample is not None and not sample.takes(*names)
        if is_other or member.kind == "end_marker":
            yield from _unless_doubtful(sample, doubtful, index)
            sample, doubtful = None, None
        if isinstance(names, str):
            _pass_over(member, names, index)
            continue
        sample = sample or TarSample(names[0], member.offset)
        sample.parts.append((names[1], member.data_offset, member.size))
        sample.length = member.data_offset + member.size - sample.offset
        if sample.length <= _MAX_LENGTH:
            num_there = member.size if end is None else min(member.size, end - member.data_offset)
            sample.contents[names[1]] = window.read(member.data_offset, num_there)
    yield from _unless_doubtful(sample, doubtful, index)


def _unless_doubtful(sample: TarSample | None, damage: str | None, index: ShardIndex) -> Iterator[TarSample]:
    if sample is not None and damage is not None:
        index.leave_out(sample.key, damage)
    elif sample is not None:
        yield sample


def _pass_over(member: tar.Member, kind: str, index: ShardIndex) -> None:
    index.ignored[kind] += 1
    if kind == "garbage":
        log.warning("%s: %d bytes after its end are no tar, and are passed over", index.shard, member.size)


def unusable(sample: TarSample, seen: set[str]) -> str | None:
    """Why a sample is left out, from its headers; `seen` holds the keys before it."""
    if sample.key in seen:
        return "duplicate_key"
    if any(size == 0 for _, _, size in sample.parts):
        return "empty_member"
    return "sample_too_large" if sample.length > _MAX_LENGTH else None


def _sample(shard: str, chunk: bytes, uid: bytes) -> Parts | SampleError:
    try:
        key, parts = tar.read_parts(chunk)
        found = decode.sample_uid(parts)
    except (tar.TarFormatError, SampleError) as error:
        return changed(shard, error)
    if found != uid:
        return changed(shard, f"sample `{key}` has other content than when it was indexed")
    return key, parts


def _refuse_compressed(file: File) -> None:
    magic = file.read(0, 8)
    for prefix, command in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise DataError(
                f"shard `{shown(file.location)}` is compressed, so its samples cannot be read at random",
                allowed="a plain .tar (images inside are compressed already)",
                remedy=f"unpack it once: `{command} {file.name}`, or read it in order: data.streaming=true",
            )
