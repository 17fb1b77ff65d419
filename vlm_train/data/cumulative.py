"""Running totals over the rows of a manifest and their inverse, from one bit or one uint16 a row.

The weight of a row is a number of units, `UNIT` of which make 1. `before(rows)` is the total that lies before each row,
`find(targets)` the row in whose weight each target falls. Both look at one block of rows and never at the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_train.errors import DataError

UNIT = 256
MAX_UNITS = (1 << 16) - 1

_WORD = 64
_BLOCK_WORDS = 16
_BLOCK = _WORD * _BLOCK_WORDS
_SUMMED = 128  # rows of weights that one sum stands for: 3 % more memory, and a search reads 256 bytes a slot
_CHUNK = 1 << 13


class Cumulative(Protocol):
    """Weights of rows, in units, with running totals. `fingerprint`: sha256 over them; `array`: what is saved."""

    file_name: str
    num_rows: int
    total: int
    fingerprint: str
    array: NDArray[Any]

    def before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Units before each of `rows` [n], each in [0, num_rows]."""

    def find(self, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row [n] for which before(row) <= target < before(row + 1), targets [n] in [0, total)."""

    def kept(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rows of [start, stop) whose weight is not 0, in order."""

    def content_hash(self) -> str:
        """sha256 over rows and weights, computed now."""

    def num_kept(self) -> int:
        """Rows whose weight is not 0."""

    def checksum(self) -> str:
        """What a load can afford to compare: the fingerprint of bits, a sha256 over the sums of blocks of weights."""


class Bits:
    """Weights 0 and 1, one bit each.

    Args:
        words: uint64 [ceil(num_rows / 64)], bit i of word w is row 64 w + i.
        num_rows: number of rows.
    """

    file_name = "selection.npy"

    def __init__(self, words: NDArray[np.uint64], num_rows: int) -> None:
        num_blocks = max(1, -(-num_rows // _BLOCK))  # whole blocks, so that `find` needs no special end
        padded = np.zeros(num_blocks * _BLOCK_WORDS, np.uint64)
        padded[: len(words)] = words
        self.array = padded[: -(-num_rows // _WORD)]
        self._words = padded.reshape(num_blocks, _BLOCK_WORDS)
        per_block = np.bitwise_count(self._words).sum(axis=1, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(per_block)])
        self.num_rows, self.total = num_rows, int(self._before[-1]) * UNIT
        self.fingerprint = self.content_hash()

    @classmethod
    def pack(cls, masks: Iterable[NDArray[np.bool_]], num_rows: int) -> Bits:
        """From masks that follow each other and are `num_rows` long together; packed as they come."""
        packed, row, rest = np.zeros(-(-num_rows // _WORD) * _WORD // 8, np.uint8), 0, np.zeros(0, bool)
        for mask in masks:
            mask = np.concatenate([rest, mask])
            whole = len(mask) // 8 * 8
            packed[row // 8 : (row + whole) // 8] = np.packbits(mask[:whole], bitorder="little")
            row, rest = row + whole, mask[whole:]
        packed[row // 8 : -(-num_rows // 8)] = np.packbits(rest, bitorder="little")
        return cls(packed.view("<u8").astype(np.uint64), num_rows)

    def before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cumulative`."""
        block = np.minimum(rows // _BLOCK, len(self._words) - 1)
        bits = np.clip((rows - block * _BLOCK)[:, None] - np.arange(0, _BLOCK, _WORD), 0, _WORD)
        whole = bits == _WORD
        below = (np.uint64(1) << np.where(whole, 0, bits).astype(np.uint64)) - np.uint64(1)
        masks = np.where(whole, np.uint64(0xFFFFFFFFFFFFFFFF), below)
        counts = np.bitwise_count(self._words[block] & masks).sum(axis=1, dtype=np.int64)
        return (self._before[block] + counts) * UNIT

    def find(self, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cumulative`."""
        ranks = targets // UNIT
        block = np.searchsorted(self._before, ranks, side="right") - 1
        words = self._words[block]
        word, left = _first_above(np.bitwise_count(words), ranks - self._before[block])
        chosen = words[np.arange(len(ranks)), word]
        bits = (chosen[:, None] >> np.arange(_WORD, dtype=np.uint64)) & np.uint64(1)
        bit, _ = _first_above(bits, left)
        return block * _BLOCK + word * _WORD + bit

    def kept(self, start: int, stop: int) -> NDArray[np.int64]:
        """See `Cumulative`."""
        first = start // _WORD
        words = self.array[first : -(-stop // _WORD)].astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return start + np.flatnonzero(bits[start - first * _WORD : stop - first * _WORD])

    def content_hash(self) -> str:
        """See `Cumulative`."""
        return hashlib.sha256(self.num_rows.to_bytes(8, "little") + self._words.tobytes()).hexdigest()

    def num_kept(self) -> int:
        """See `Cumulative`."""
        return self.total // UNIT

    def checksum(self) -> str:
        """See `Cumulative`."""
        return self.fingerprint


class Weights:
    """Weights from 0 to 255.996 in steps of 1/256, two bytes each.

    Args:
        units: uint16, a multiple of 128 long, zeros from `num_rows` on. Kept as it is, so it may be memory-mapped.
        num_rows: number of rows.
        fingerprint: of the content, where it is known; it takes a pass over all of it.
    """

    file_name = "weights.npy"

    def __init__(self, units: NDArray[np.uint16], num_rows: int, fingerprint: str | None = None) -> None:
        if units.dtype != np.uint16 or units.shape != (self.padded(num_rows),):
            raise ValueError(f"{units.dtype} {units.shape} cannot hold the weights of {num_rows} rows")
        self.array, self.num_rows = np.asarray(units), num_rows
        self._blocks = self.array.reshape(-1, _SUMMED)
        self._before = np.concatenate([[0], np.cumsum(self._blocks.sum(axis=1, dtype=np.int64))])
        self.total = int(self._before[-1])
        self.fingerprint = fingerprint or self.content_hash()

    @staticmethod
    def padded(num_rows: int) -> int:
        """Length of the array for so many rows."""
        return max(1, -(-num_rows // _SUMMED)) * _SUMMED

    @classmethod
    def pack(cls, weights: Iterable[NDArray[Any]], num_rows: int) -> Weights:
        """From floats that follow each other and are `num_rows` long together, each rounded to the nearest 1/256.

        Raises:
            DataError: a weight is negative, too large or not a number.
        """
        units, row = np.zeros(cls.padded(num_rows), np.uint16), 0
        for chunk in weights:
            scaled = np.rint(np.multiply(chunk, UNIT, dtype=np.float64))
            if len(scaled) and not (np.min(chunk) >= 0 and scaled.max() <= MAX_UNITS):  # NaN passes neither
                raise _no_weight(np.asarray(chunk, np.float64), scaled, row)
            units[row : row + len(chunk)] = scaled
            row += len(chunk)
        return cls(units, num_rows)

    def before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cumulative`."""
        found = np.empty(len(rows), np.int64)
        for first in range(0, len(rows), _CHUNK):
            some = rows[first : first + _CHUNK]
            block = np.minimum(some // _SUMMED, len(self._blocks) - 1)
            inside = np.arange(_SUMMED) < (some - block * _SUMMED)[:, None]
            partial = (self._blocks[block] * inside).sum(axis=1, dtype=np.int64)
            found[first : first + _CHUNK] = self._before[block] + partial
        return found

    def find(self, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cumulative`."""
        block = np.searchsorted(self._before, targets, side="right") - 1
        row, _ = _first_above(self._blocks[block], targets - self._before[block])
        return block * _SUMMED + row

    def kept(self, start: int, stop: int) -> NDArray[np.int64]:
        """See `Cumulative`."""
        return start + np.flatnonzero(self.array[start:stop])

    def content_hash(self) -> str:
        """See `Cumulative`."""
        digest = hashlib.sha256(b"weights" + self.num_rows.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.array.astype("<u2", copy=False)).data)
        return digest.hexdigest()

    def num_kept(self) -> int:
        """See `Cumulative`."""
        return int(np.count_nonzero(self.array))

    def checksum(self) -> str:
        """See `Cumulative`."""
        return hashlib.sha256(self._before.tobytes()).hexdigest()


def _no_weight(weights: NDArray[np.float64], scaled: NDArray[np.float64], row: int) -> DataError:
    """The first of `weights` [n], rows from `row` on, that is out of range."""
    first = int((~((weights >= 0) & (scaled <= MAX_UNITS))).argmax())
    return DataError(
        f"the weight of row {row + first} cannot be a repeat weight",
        got=float(weights[first]),
        allowed=f"0 to {MAX_UNITS / UNIT:.3f}: how often the row comes in an epoch",
        remedy="scale the weights, or cut them off",
    )


def _first_above(counts: NDArray[Any], left: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per row: the first column whose running total exceeds `left`, and what of `left` remains before it."""
    totals = np.cumsum(counts, axis=1, dtype=np.int32)  # of a block: at most 128 x 65,535
    column = (totals > left.astype(np.int32)[:, None]).argmax(axis=1)
    rows = np.arange(len(left))
    return column, left - (totals[rows, column] - counts[rows, column].astype(np.int64))
