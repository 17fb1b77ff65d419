"""One pass over binary codes: the pairs that agree in its fixed bits and lie near, in bounded memory.

Codes lie as columns, uint64 [W, N], in memory or in a mapped file; see `hamming_passes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation.hamming_passes import PREFIX_BITS, Pass, Words

CHUNK = 1 << 16  # rows worked on at once: their arrays fit into a core's cache
_HISTOGRAM_BITS = 16
_ROW_BITS = np.uint64(64 - PREFIX_BITS)
_ROW_MASK = np.uint64((1 << (64 - PREFIX_BITS)) - 1)

Rows = NDArray[np.int64]


@dataclass(slots=True)
class Part:
    """Columns whose prefixes lie in one range, in the order of their numbers.

    `keys` [n]: prefix, then place in this part; `rows` [n]: numbers of the columns; `codes` [W, n].
    """

    keys: Words
    rows: NDArray[np.uint32]
    codes: Words

    def sort_by_prefix(self) -> None:
        """Puts columns with equal prefixes side by side. Keys are sorted by value, which is faster than by index."""
        self.keys.sort()
        for array in (self.rows, *self.codes):
            moved = np.empty_like(array)
            for start in range(0, len(array), CHUNK):
                places = (self.keys[start : start + CHUNK] & _ROW_MASK).astype(np.int64)
                moved[start : start + CHUNK] = array.take(places)
            array[:] = moved


def parts(codes: Words, fixed: Pass, max_rows: int) -> Iterator[Part]:
    """All columns of codes [W, N], in parts by rising ranges of prefixes, each of at most `max_rows` columns.

    A part is larger only where more columns than that have the same highest 16 bits of their prefix.
    """
    for low, high, num in _ranges(codes, fixed, max_rows):
        yield _part(codes, fixed, low, high, num)


def _ranges(codes: Words, fixed: Pass, max_rows: int) -> Iterator[tuple[int, int, int]]:
    """(lowest prefix, prefix after the highest, number of columns), none of them empty."""
    num_columns, num_bits = codes.shape[1], len(fixed.bits)
    if num_columns <= max_rows:
        yield from [(0, 1 << num_bits, num_columns)] if num_columns else []
        return
    shift = max(num_bits - _HISTOGRAM_BITS, 0)
    counts = np.zeros(1 << (num_bits - shift), np.int64)
    for _, chunk in _chunks(codes):
        bins = (fixed.prefix(chunk) >> np.uint64(shift)).astype(np.int64)
        counts += np.bincount(bins, minlength=len(counts))
    sums = np.concatenate([[0], np.cumsum(counts)])
    low = 0
    while sums[low] < num_columns:
        high = max(low + 1, int(np.searchsorted(sums, sums[low] + max_rows, side="right")) - 1)
        if sums[high] > sums[low]:
            yield low << shift, high << shift, int(sums[high] - sums[low])
        low = high


def _part(codes: Words, fixed: Pass, low: int, high: int, num: int) -> Part:
    part = Part(np.empty(num, np.uint64), np.empty(num, np.uint32), np.empty((len(codes), num), np.uint64))
    filled = 0
    for start, chunk in _chunks(codes):
        prefixes = fixed.prefix(chunk)
        inside = np.flatnonzero((prefixes >= low) & (prefixes < high))
        place = slice(filled, filled + len(inside))
        part.keys[place] = prefixes.take(inside) << _ROW_BITS
        part.keys[place] |= np.arange(place.start, place.stop, dtype=np.uint64)
        part.rows[place] = inside + start
        for word, column in enumerate(chunk):
            part.codes[word, place] = column.take(inside)
        filled = place.stop
    return part


def _chunks(codes: Words) -> Iterator[tuple[int, Words]]:
    for start in range(0, codes.shape[1], CHUNK):
        yield start, np.ascontiguousarray(codes[:, start : start + CHUNK])


def join(
    codes: Words, fixed: Pass, earlier: Sequence[Pass], radius: int, max_rows: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Pairs of columns that this pass sees and no earlier one, at most `radius` bits apart: two arrays [P]."""
    left_rows, right_rows = [], []
    for part in parts(codes, fixed, max_rows):
        part.sort_by_prefix()
        for left, right in _gathered(_near(part.codes, fixed, radius)):
            for other in earlier:
                unseen = np.flatnonzero(~other.agree(part.codes, left, right))
                left, right = left.take(unseen), right.take(unseen)
            left_rows.append(part.rows.take(left))
            right_rows.append(part.rows.take(right))
    none = np.empty(0, np.uint32)
    return np.concatenate([none, *left_rows]), np.concatenate([none, *right_rows])


def _near(codes: Words, fixed: Pass, radius: int) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of near places with the same prefix, out of codes [W, n] sorted by it.

    Each place is held against the next one, the one after that, and so on until the prefix changes.
    """
    num = codes.shape[1]
    for start in range(0, num, CHUNK):
        left, step = np.arange(start, min(start + CHUNK, num)), 1
        while len(left):
            left = left[: np.searchsorted(left, num - step)]
            left = left.take(np.flatnonzero(fixed.agree(codes, left, left + step)))
            near = within(codes, left, left + step, radius)
            if len(near):
                yield left.take(near), left.take(near) + step
            step += 1


def _gathered(found: Iterator[tuple[Rows, Rows]]) -> Iterator[tuple[Rows, Rows]]:
    """The same pairs in fewer blocks: most steps of `_near` find a pair or two."""
    lefts: list[Rows] = []
    rights: list[Rows] = []
    for left, right in found:
        lefts.append(left)
        rights.append(right)
        if sum(map(len, lefts)) >= CHUNK:
            yield np.concatenate(lefts), np.concatenate(rights)
            lefts, rights = [], []
    if lefts:
        yield np.concatenate(lefts), np.concatenate(rights)


def within(codes: Words, left: Rows, right: Rows, radius: int) -> Rows:
    """Places in `left` and `right` [P] of pairs of codes [W, N] at most `radius` bits apart."""
    kept = np.arange(len(left))
    total = np.zeros(len(left), np.uint16)
    for word in codes:
        total += np.bitwise_count(word.take(left) ^ word.take(right))
        near = np.flatnonzero(total <= radius)
        kept, total, left, right = kept.take(near), total.take(near), left.take(near), right.take(near)
    return kept


def distances(codes: Words, left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.uint8]:
    """Hamming distance of columns `left` and `right` [P] of codes [W, N]; at most 255."""
    total = np.zeros(len(left), np.uint8)
    for word in codes:
        total += np.bitwise_count(word[left] ^ word[right])
    return total
