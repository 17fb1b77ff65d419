"""All pairs of near-equal binary codes, exactly: 64-bit perceptual hashes of pictures, 256-bit codes of views.

How the pairs are found is told in `hamming_passes`; a pass sorts all codes by some of their bits and looks at
neighbours. There is no index to keep, and what is held in memory at once is bounded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation import hamming_scan as scan
from vlm_train.curation.hamming_passes import PREFIX_BITS, Pass, Words, plan
from vlm_train.errors import ConfigError, DataError

WORDS = {1: "uint64 [N]", 4: "uint64 [N, 4]"}
MAX_ROWS = 1 << PREFIX_BITS
MOST_PAIRS = 1 << 30
"""10 GB of them."""
_HALF = np.uint64(PREFIX_BITS)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of rows, sorted by the first row, then by the second.

    `rows`: uint32 [P, 2], the smaller row first. `distance`: uint8 [P], bits in which the codes of the two differ.
    """

    rows: NDArray[np.uint32]
    distance: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.distance)


def pairs_within(
    codes: Words,
    radius: int,
    *,
    bands: Sequence[Pass] | None = None,
    memory: int = 4 << 30,
    workers: int = 1,
    most: int = MOST_PAIRS,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """Every pair of distinct codes at most `radius` bits apart, and the rows of equal codes as a star. None is missed.

    Rows with one and the same code, of which there may be millions (blank pictures), are not paired with each other:
    each is paired with the first row of its code, at distance 0. For distinct codes the pair is of the first rows of
    both, with the exact distance. As edges of a graph these have the connected components that all pairs of rows
    would have. The result depends on nothing but codes and radius; it takes 9 bytes a pair, besides `memory`.

    Args:
        codes: uint64 [N] or [N, 4], N < 2 ** 32; may be mapped from a .npy file, and is read in order.
        radius: bits; at most a quarter of the bits of a code. Pairs among random codes, and with them the time,
            grow quickly with it: 4 suits millions of 64-bit codes, 31 a million of 256-bit codes.
        bands: where given, only pairs that agree in all bits of at least one of these are found, in time that grows
            with their number and not with the radius.
        memory: bytes held at once, about, besides pages of mapped files, which the system may drop; with less, the
            codes are read more often.
        workers: threads; each takes its share of the memory.
        most: pairs of distinct codes; with more the search ends.
        folder: where temporary files lie (deleted at the end), by default the system's place; only used when the
            distinct codes take more than a quarter of `memory`.
        progress: called with (passes done, in all).

    Raises:
        ConfigError: codes of another type or shape, or a radius, memory or number of workers out of range.
        DataError: more than `most` pairs.
    """
    _check(codes, radius, memory, workers)
    columns = codes[None] if codes.ndim == 1 else codes.T
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        distinct, first_rows, keys = _collapse(columns, memory, Path(scratch))
        if radius > 0 and len(first_rows) > 1:
            passes = plan(distinct, radius) if bands is None else bands
            found = _joined(distinct, first_rows, passes, radius, memory, workers)
            keys = np.concatenate([keys, *_told(_no_more_than(most, found), len(passes), progress)])
    keys.sort()
    return _unpacked(columns, keys)


def _check(codes: Words, radius: int, memory: int, workers: int) -> None:
    num_words = codes.shape[1] if codes.ndim == 2 else 1
    if codes.dtype != np.uint64 or codes.ndim not in (1, 2) or num_words not in WORDS or len(codes) >= MAX_ROWS:
        got, allowed = f"{codes.dtype} {list(codes.shape)}", f"{' or '.join(WORDS.values())}, N < {MAX_ROWS}"
        raise ConfigError("the binary codes are not of a known form", got=got, allowed=allowed)
    if not 0 <= radius <= 16 * num_words:
        raise ConfigError("the radius of near codes is out of range", got=radius, allowed=f"0 to {16 * num_words} bits")
    for name, value in (("memory", memory), ("workers", workers)):
        if value < 1:
            raise ConfigError(f"{name} of the search for near codes is too small", got=value, allowed="at least 1")


def _packed(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> Words:
    """Pairs as numbers that sort by the smaller row, then by the larger: [P]."""
    return (np.minimum(left, right).astype(np.uint64) << _HALF) | np.maximum(left, right)


def _unpacked(columns: Words, keys: Words) -> Pairs:
    pairs = Pairs(np.empty((len(keys), 2), np.uint32), np.empty(len(keys), np.uint8))
    for start in range(0, len(keys), scan.CHUNK):
        place = slice(start, start + scan.CHUNK)
        pairs.rows[place, 0] = keys[place] >> _HALF
        pairs.rows[place, 1] = keys[place] & np.uint64(MAX_ROWS - 1)
        pairs.distance[place] = scan.distances(columns, pairs.rows[place, 0], pairs.rows[place, 1])
    return pairs


def _collapse(columns: Words, memory: int, scratch: Path) -> tuple[Words, NDArray[np.uint32], Words]:
    """Distinct codes [W, U] in rising order, the first row of each [U], and the stars of equal codes, packed."""
    num_words, num_rows = columns.shape
    distinct = _array((num_words, num_rows), np.uint64, memory // 4, scratch / "codes")
    first_rows = _array((num_rows,), np.uint32, memory // 4, scratch / "rows")
    stars, filled = [np.empty(0, np.uint64)], 0
    for part in scan.parts(columns, Pass(tuple(range(PREFIX_BITS))), _max_rows(memory, 56 + 16 * num_words)):
        order = np.lexsort(part.codes[::-1])  # stable: of equal codes the first row comes first
        rows, codes = part.rows.take(order), part.codes.take(order, axis=1)
        heads = np.concatenate([[True], (codes[:, 1:] != codes[:, :-1]).any(axis=0)])
        others = np.flatnonzero(~heads)
        groups = np.cumsum(heads) - 1
        firsts = np.flatnonzero(heads)
        stars.append(_packed(rows.take(firsts).take(groups.take(others)), rows.take(others)))
        place = slice(filled, filled + len(firsts))
        distinct[:, place], first_rows[place] = codes.take(firsts, axis=1), rows.take(firsts)
        filled = place.stop
    return distinct[:, :filled], first_rows[:filled], np.concatenate(stars)


def _joined(
    distinct: Words, first_rows: NDArray[np.uint32], passes: Sequence[Pass], radius: int, memory: int, workers: int
) -> Iterator[Words]:
    """Packed pairs of the first rows of near distinct codes, pass by pass."""
    max_rows = _max_rows(memory // workers, 20 + 8 * len(distinct))

    def one(number: int) -> Words:
        left, right = scan.join(distinct, passes[number], passes[:number], radius, max_rows)
        return _packed(first_rows.take(left), first_rows.take(right))

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, range(len(passes)))


def refuse_more(num: int, most: int) -> None:
    """Raises DataError where there are more pairs than one can hold."""
    if num > most:
        raise DataError("too many pictures look alike to a hash", got=f"over {most:,} pairs that would be compared",
                        allowed=f"at most {most:,}",
                        remedy="a smaller radius, covered ones not looked for, flat ones pruned first")  # fmt: skip


def _no_more_than(most: int, found: Iterator[Words]) -> Iterator[Words]:
    num = 0
    for each in found:
        num += len(each)
        refuse_more(num, most)
        yield each


def _told(found: Iterator[Words], num: int, progress: Callable[[int, int], None] | None) -> Iterator[Words]:
    for done, each in enumerate(found, 1):
        if progress is not None:
            progress(done, num)
        yield each


def _max_rows(memory: int, row_bytes: int) -> int:
    """Rows of a part: parts may take half of the memory."""
    return max(1, memory // 2 // row_bytes)


def _array(shape: tuple[int, ...], dtype: Any, max_bytes: int, path: Path) -> NDArray[Any]:
    """An array in memory, or in a file where it takes more than `max_bytes`."""
    if int(np.prod(shape)) * np.dtype(dtype).itemsize <= max(max_bytes, 0):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "w+", shape=shape)
