"""Tars read from the first byte to the last: for what cannot be read at random, compressed tars and servers without
ranges.

The samples are the ones that indexing would find, by the same walk and the same rules (`formats.tar`), but they are
known only as they pass by. So the weaker promises of streaming: no manifest and no selection, an epoch's length is
unknown until it has been read, every rank reads every byte, and going on in the middle means reading up to there again.
What still holds: the same order for any number of ranks and workers, and after a restart.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np
import pyarrow as pa

from vlm_train.data import decode
from vlm_train.data.decode import SampleError
from vlm_train.data.formats.base import ShardIndex, describe
from vlm_train.data.formats.tar import samples, unusable
from vlm_train.data.order import derive
from vlm_train.errors import DataError
from vlm_train.locations import is_remote, name_of
from vlm_train.log import get_logger
from vlm_train.types import RawSample

log = get_logger(__name__)

_CHUNK = 1 << 20
_ENDLESS = 1 << 62


def _zstd(stream: BinaryIO) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}
_DAMAGE = (OSError, EOFError, lzma.LZMAError, gzip.BadGzipFile)


class Tape:
    """A stream that answers `read(offset, length)` as long as nobody looks further back than `forget` allows.

    Args:
        stream: what is read, once, forwards.
    """

    def __init__(self, stream: BinaryIO) -> None:
        # one decompressed piece at a time: `read` would throw what it has away where a stream breaks off
        self._more: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
        self.start, self.buffer = 0, bytearray()

    def read(self, offset: int, length: int) -> bytes:
        """Those bytes, fewer at the end of the stream."""
        while self.start + len(self.buffer) < offset + length:
            chunk = self._more(_CHUNK)
            if not chunk:
                break
            self.buffer += chunk
        return bytes(self.buffer[offset - self.start : offset - self.start + length])

    def forget(self, offset: int) -> None:
        """Nothing before `offset` will be asked for again."""
        del self.buffer[: offset - self.start]
        self.start = max(self.start, offset)


def read_shard(location: str, errors: list[dict[str, str]]) -> Iterator[RawSample]:
    """The samples of one tar, compressed or not, in order; what cannot be used is added to `errors`.

    Raises:
        OSError: the shard cannot be opened.
    """
    index = ShardIndex(name_of(location))
    index.errors = errors
    with _open(location) as stream:
        try:
            yield from _usable(Tape(stream), index)
        except _DAMAGE as error:
            log.warning("%s breaks off: %s; what comes after is lost", index.shard, error)
            index.leave_out("", "truncated")


def _usable(tape: Tape, index: ShardIndex) -> Iterator[RawSample]:
    seen: set[str] = set()
    for sample in samples(tape, _ENDLESS, index):
        reason = unusable(sample, seen)
        seen.add(sample.key)
        contents = {part: tape.read(offset, size) for part, offset, size in sample.parts}
        tape.forget(sample.offset + sample.length)
        if any(len(contents[part]) < size for part, _, size in sample.parts):
            reason = "truncated"
        uid = _uid(contents)
        if reason is None and isinstance(uid, bytes):
            yield RawSample(uid, sample.key, index.shard, contents)
        else:
            index.leave_out(sample.key, reason or str(uid))


def _uid(contents: dict[str, bytes]) -> bytes | str:
    """The uid, or the reason why the sample cannot be used."""
    try:
        describe(contents)
        return decode.sample_uid(contents)
    except SampleError as error:
        return error.reason


def _open(location: str) -> BinaryIO:
    file = fsspec.open(location, "rb").open() if is_remote(location) else open(location, "rb")  # noqa: SIM115
    stream = cast(BinaryIO, file)
    magic = stream.read(8)
    stream.seek(0)
    opener = next((opener for prefix, opener in _OPENERS.items() if magic.startswith(prefix)), None)
    return cast(BinaryIO, opener(stream)) if opener else stream


class ShuffledTapes:
    """Epoch after epoch of some tars: their order is drawn anew in each, and a buffer mixes neighbours.

    Args:
        shards: locations of tars.
        seed: of the order.
        buffer: samples that are mixed; 0 keeps the order of the files.
    """

    def __init__(self, shards: Sequence[str], *, seed: int, buffer: int) -> None:
        self.shards, self.seed, self.buffer = list(shards), seed, buffer

    def epoch(self, number: int, errors: list[dict[str, str]]) -> Iterator[RawSample]:
        """One epoch. Raises DataError when it holds no sample at all, so that nothing waits for ever."""
        key = int(derive(self.seed, np.array([number], np.uint64))[0])
        order = np.argsort(derive(key, np.arange(len(self.shards), dtype=np.uint64)), kind="stable")
        chosen = [self.shards[index] for index in order] if self.buffer else self.shards
        held: list[RawSample] = []
        num = 0
        for sample in self._read(chosen, errors):
            num += 1
            held.append(sample)
            if len(held) > self.buffer:
                yield _draw(held, key, num)
        while held:
            num += 1
            yield _draw(held, key, num)
        if not num:
            raise DataError("the shards hold no usable sample", got=errors[:5], remedy="see `vlm-train data verify`")

    def _read(self, shards: list[str], errors: list[dict[str, str]]) -> Iterator[RawSample]:
        for shard in shards:
            try:
                yield from read_shard(shard, errors)
            except OSError as error:
                log.warning("%s cannot be read: %s", shard, error)
                errors.append({"shard": name_of(shard), "key": "", "reason": "unreadable"})


def _draw(held: list[RawSample], key: int, num: int) -> RawSample:
    """Takes one of the held samples out, chosen by the count alone."""
    place = int(derive(key, np.array([num], np.uint64))[0] % np.uint64(len(held))) if len(held) > 1 else 0
    held[place], held[-1] = held[-1], held[place]
    return held.pop()
