"""Which pictures are worth comparing by their thumbnails: those that some short code holds to be near.

Two are compared where their pHashes differ in at most so many bits (all such pairs are found), or where one's view of
the whole and the other's of the whole or of the middle agree in all `BAND_BITS` bits of one of `NUM_BANDS` bands and
differ in at most `VIEW_RADIUS` of 256; for covered pictures also where the same part of both does, a tile or a strip.
Of the pairs within the radius those that agree in no band are given up; in return the time grows by the number of
pictures, not by its square (Indyk and Motwani, Approximate Nearest Neighbors, STOC 1998).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.curation.chain import Ticking
from vlm_train.curation.hamming import pairs_within, refuse_more
from vlm_train.curation.hamming_passes import Pass, Words
from vlm_train.curation.views import BITS, CODES_BYTES, MIDDLE, PARTS, WHOLE
from vlm_train.data.manifest import packed

VIEW_RADIUS = 30
"""Bits of 256: of copies cropped at random one in a hundred differs in more than 25, none in more than 33."""
NUM_BANDS, BAND_BITS = 64, 28

BANDS = [
    Pass(tuple(sorted(np.random.default_rng(number).choice(BITS, BAND_BITS, replace=False).tolist())))
    for number in range(NUM_BANDS)
]

MOST_PAIRS = 200_000_000
"""That are compared: 5 GB, and hours."""

_CHUNK = 1 << 16  # pairs held at a time
_HALF = np.uint64(32)

Pairs = NDArray[np.int64]  # [n, 2] rows


class Parts(Protocol):
    """Of a manifest what is looked at here."""

    starts: NDArray[np.int64]

    def part(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """The rows of one shard."""


def candidates(
    manifest: Parts,
    rows: NDArray[np.int64],
    phash: Words,
    *,
    radius: int,
    with_parts: bool,
    workers: int,
    ticking: Ticking,
) -> Pairs:
    """Pairs of places in `rows` [M], the smaller first, each once, in rising order.

    Args:
        manifest: has `views`; they are copied to a temporary file, 96 bytes a row, and half as much with parts.
        rows: those that are compared, in rising order.
        phash: [M], theirs.
        radius: bits of pHash.
        with_parts: whether covered pictures are looked for.
        workers: threads.
        ticking: of the passes of a search.

    Raises:
        DataError: there are more than `MOST_PAIRS`.
    """
    num, found, num_found = len(rows), [np.empty(0, np.uint64)], 0

    def join(what: str, codes: Words, radius: int, bands: Sequence[Pass] | None) -> None:
        nonlocal num_found
        progress = ticking(f"passes of the search by {what}")
        for pairs in near_pairs(codes, radius, bands, workers, progress):
            found.append(_keys(pairs, num))
            num_found += len(found[-1])
            refuse_more(num_found, MOST_PAIRS)

    join("pHash", phash, radius, None)
    with tempfile.TemporaryDirectory() as folder:
        join("views", _views(manifest, rows, [WHOLE, MIDDLE], Path(folder) / "wholes"), VIEW_RADIUS, BANDS)
        for place, number in enumerate(PARTS if with_parts else (), 1):
            parts = _views(manifest, rows, [number], Path(folder) / "part")
            join(f"part {place} of {len(PARTS)}", parts, VIEW_RADIUS, BANDS)
    keys = np.unique(np.concatenate(found))
    return np.stack([keys >> _HALF, keys & np.uint64((1 << 32) - 1)], axis=1).astype(np.int64)


def near_pairs(
    codes: Words,
    radius: int,
    bands: Sequence[Pass] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Pairs]:
    """All pairs of rows of near codes, see `pairs_within`, and of equal ones, in blocks. A code of 0 is that of a flat
    view, which is near to nothing."""
    joined = pairs_within(codes, radius, bands=bands, workers=workers, most=MOST_PAIRS, progress=progress)
    rows = np.unique(joined.rows)  # the others are near to none
    places = np.searchsorted(rows, joined.rows)
    first = np.arange(len(rows))  # place of the first row of the same code
    are_equal = joined.distance == 0
    first[places[are_equal, 1]] = places[are_equal, 0]
    members = np.argsort(first, kind="stable")
    heads = np.flatnonzero(np.diff(first[members], prepend=-1))
    sizes = np.diff(np.append(heads, len(members)))
    group = np.empty(len(rows), np.int64)
    group[members] = np.repeat(np.arange(len(heads)), sizes)
    several = np.flatnonzero(sizes > 1)
    words = codes if codes.ndim == 2 else codes[:, None]
    itself = several[words[rows[members[heads[several]]]].any(axis=1)]
    for pairs in (group[places[~are_equal]], np.stack([itself, itself], axis=1)):
        for found in _products(heads, sizes, pairs):
            yield rows[members[found]].astype(np.int64)


def _products(heads: NDArray[np.int64], sizes: NDArray[np.int64], pairs: Pairs) -> Iterator[Pairs]:
    """Of each pair of groups every pair of their places, `_CHUNK` at a time; a group with itself: each pair once."""
    counts = sizes[pairs[:, 0]] * sizes[pairs[:, 1]]
    ends = np.cumsum(counts)
    for start in range(0, int(ends[-1]) if len(ends) else 0, _CHUNK):
        place = np.arange(start, min(start + _CHUNK, int(ends[-1])))
        number = np.searchsorted(ends, place, side="right")
        within = place - (ends - counts)[number]
        left, right = pairs[number].T
        a, b = heads[left] + within // sizes[right], heads[right] + within % sizes[right]
        yield np.stack([a, b], axis=1)[(left != right) | (a < b)]


def _keys(pairs: Pairs, num: int) -> Words:
    """Pairs of pictures as numbers, each once; a place from `num` on is another view of picture place - num."""
    pictures = (pairs % num).astype(np.uint64)
    low, high = pictures.min(axis=1), pictures.max(axis=1)
    return np.unique((low << _HALF | high)[low < high])


def _views(manifest: Parts, rows: NDArray[np.int64], numbers: Sequence[int], path: Path) -> Words:
    """Codes of views of rows, one view behind the other, in a file: [len(numbers) * M, 4]."""
    codes = np.memmap(path, np.uint64, "w+", shape=(max(1, len(numbers) * len(rows)), 4))
    for place, found in column_of(manifest, rows, "views", CODES_BYTES):
        words = found.view(np.uint64).reshape(len(found), -1, 4)
        for order, number in enumerate(numbers):
            codes[order * len(rows) + place.start : order * len(rows) + place.stop] = words[:, number]
    return codes[: len(numbers) * len(rows)]


def column_of(
    manifest: Parts, rows: NDArray[np.int64], name: str, size: int
) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """(places in `rows`, values uint8 [m, size]) of a column of bytes, shard by shard. `rows` rise."""
    edges = np.searchsorted(rows, manifest.starts)
    for shard in np.flatnonzero(np.diff(edges)).tolist():
        place = slice(int(edges[shard]), int(edges[shard + 1]))
        column = manifest.part(shard, [name])[name].fill_null(bytes(size))
        values = np.frombuffer(packed(column), np.uint8).reshape(-1, size)
        yield place, values[rows[place] - manifest.starts[shard]]
