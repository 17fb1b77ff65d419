"""Tars read from the first byte to the last: for what cannot be read at random, compressed tars and servers without
ranges.

The samples are the ones that indexing would find, by the same walk and the same rules (`formats.tar`), but they are
known only as they pass by. So the weaker promises of streaming: no manifest and no selection, an epoch's length is
unknown until it has been read, every rank reads every byte, and going on in the middle means reading up to there again.
What still holds: the same order for any number of ranks and workers, and after a restart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from vlm_train.data.decode import SampleError
from vlm_train.data.files import StorageOptions
from vlm_train.data.formats.base import ShardIndex, describe
from vlm_train.data.formats.tar import TarSample, samples, unusable
from vlm_train.data.order import derive
from vlm_train.data.retry import describe as in_words
from vlm_train.data.unpacking import unpacked
from vlm_train.errors import DataError, VlmError
from vlm_train.locations import name_of, shown
from vlm_train.log import get_logger
from vlm_train.types import RawSample

log = get_logger(__name__)

_LAST_WORDS = ("truncated", "no_end_marker")  # of a walk over a tar that breaks off


class Tape:
    """Pieces of a stream that answer `read(offset, length)`, as long as offsets ascend: it only winds forward, and what
    it has passed is forgotten.

    `broken`: why the stream cannot be read to its end, None while nothing is wrong. It seems to end there.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._start, self._buffer = 0, bytearray()
        self.broken: Exception | None = None

    def read(self, offset: int, length: int) -> bytes:
        """Those bytes, fewer at the end of the stream."""
        assert offset >= self._start, f"the tape is past byte {offset} already"
        while self._start + len(self._buffer) < offset and self._wind():
            self._forget(offset)
        self._forget(offset)
        while len(self._buffer) < length and self._wind():
            pass
        return bytes(memoryview(self._buffer)[:length])

    def _forget(self, offset: int) -> None:
        num = min(offset - self._start, len(self._buffer))
        del self._buffer[:num]
        self._start += num

    def _wind(self) -> bool:
        try:
            piece = next(self._pieces, b"") if self.broken is None else b""
        except Exception as error:  # each library has its own family
            self.broken, piece = error, b""
        self._buffer += piece
        return bool(piece)


def read_shard(
    location: str, errors: list[dict[str, str]], options: StorageOptions | None = None
) -> Iterator[RawSample]:
    """The samples of one tar, compressed or not, in order; what cannot be used is added to `errors`. `options`: for
    servers.

    Raises:
        DataError: a package is missing that this kind of server needs.
    """
    index = ShardIndex(name_of(location))
    try:
        tape = Tape(unpacked(location, options))
    except VlmError:
        raise
    except Exception as error:  # each library has its own family
        log.warning("%s cannot be read: %s", shown(location), in_words(error))
        index.leave_out("", "shard_unreadable")
        errors += index.errors
        return
    for sample in _usable(tape, index):
        errors += index.errors
        index.errors.clear()
        yield sample
    if tape.broken is not None:
        log.warning("%s breaks off: %s; what comes after is lost", shown(location), in_words(tape.broken))
        if not any(error["reason"] in _LAST_WORDS for error in index.errors):  # it broke behind the end of a tar
            index.leave_out("", "truncated")
    errors += index.errors


def _usable(tape: Tape, index: ShardIndex) -> Iterator[RawSample]:
    seen: set[str] = set()
    for sample in samples(tape, None, index):
        reason = unusable(sample, seen)
        seen.add(sample.key)
        uid = _uid(sample) if reason is None else b""
        if isinstance(uid, bytes) and reason is None:
            yield RawSample(uid, sample.key, index.shard, sample.contents)
        else:
            index.leave_out(sample.key, reason or str(uid))


def _uid(sample: TarSample) -> bytes | str:
    """The uid, or the reason why the sample cannot be used."""
    try:
        return describe(sample.contents)["uid"]
    except SampleError as error:
        return error.reason


class ShuffledTapes:
    """Epoch after epoch of some tars: their order is drawn anew in each, and a buffer mixes neighbours.

    Args:
        shards: locations of tars.
        seed: of the order.
        buffer: samples that are mixed; 0 keeps the order of the files.
        options: for servers.
    """

    def __init__(self, shards: Sequence[str], *, seed: int, buffer: int, options: StorageOptions | None = None) -> None:
        self.shards, self.seed, self.buffer, self.options = list(shards), seed, buffer, options

    def epoch(self, number: int, errors: list[dict[str, str]]) -> Iterator[RawSample]:
        """One epoch. Raises DataError when it holds no sample at all, so that nothing waits for ever."""
        key = int(derive(self.seed, np.array([number], np.uint64))[0])
        order = np.argsort(derive(key, np.arange(len(self.shards), dtype=np.uint64)), kind="stable")
        chosen = [self.shards[index] for index in order] if self.buffer else self.shards
        held: list[RawSample] = []
        num = 0
        for sample in itertools.chain.from_iterable(read_shard(shard, errors, self.options) for shard in chosen):
            num += 1
            held.append(sample)
            if len(held) > self.buffer:
                yield _draw(held, key, num)
        while held:
            num += 1
            yield _draw(held, key, num)
        if not num:
            found = "; ".join(f"{bad['shard']} {bad['key'] or '(start)'}: {bad['reason']}" for bad in errors[:5])
            raise DataError(
                "the shards hold no usable sample",
                got=found or "no part of a sample",
                allowed="samples of an image (jpg, png, webp) and a caption (txt, or captions in json)",
                remedy="correct `data.train.shards`",
            )


def _draw(held: list[RawSample], key: int, num: int) -> RawSample:
    """Takes one of the held samples out, chosen by the count alone."""
    place = int(derive(key, np.array([num], np.uint64))[0] % np.uint64(len(held))) if len(held) > 1 else 0
    held[place], held[-1] = held[-1], held[place]
    return held.pop()
