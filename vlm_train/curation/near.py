"""Which pictures of a dataset are copies of each other: byte for byte, or as far as fingerprints tell.

*exact*: the images of two samples have the same bytes. *near*: their pHashes differ in at most `radius` bits, or their
PDQ hashes in at most `PDQ_RADIUS`, and no value of their 8 x 8 colours by more than `COLOUR_TOLERANCE`. Pictures of a
quality below `LEAST_QUALITY` are compared by their bytes alone: flat ones all have one hash.

Of each cluster the sample with the most pixels is kept, of equals that of the least uid. What is a copy of that one is
dropped. What is only a copy of its copies is not: among the rest the same is done again, so that no chain of small
differences drops a picture that nothing kept is like. Neither the order of the shards nor the number of workers
decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.curation.clusters import canonical, components
from vlm_train.curation.fingerprints import COLOUR_BYTES
from vlm_train.curation.hamming import pairs_within
from vlm_train.data.manifest import Manifest, packed

LEAST_QUALITY = 5
"""Of a fingerprint that is compared. Meta's advice for PDQ alone is 50; colours are compared too here, and drawings and
diagrams have less."""

RADIUS, PDQ_RADIUS = 4, 31
"""Bits of 64; bits of 256, Meta's advice."""

COLOUR_TOLERANCE = 24
"""Of 256 levels."""

EXACT, NEAR = "exact", "near"
_COLUMNS = ("width", "height", "image_hash", "phash", "pdq", "quality", "colours")
_CHUNK = 1 << 16  # pairs whose colours are compared at a time

Edges = NDArray[np.int64]  # [n, 2] rows


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """What is a copy of what.

    `kept` int64 [N]: for each row the one that stays and that it is a copy of; itself where it stays.
    `is_exact` bool [N]: whether its images have the bytes of those of the kept one.
    `distance` int64 [N]: bits by which its pHash differs from that of the kept one, 0 without a picture.
    """

    kept: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    distance: NDArray[np.int64]

    @property
    def is_kept(self) -> NDArray[np.bool_]:
        """bool [N]: the rows that stay."""
        return self.kept == np.arange(len(self.kept))


def find_copies(
    manifest: Manifest, *, among: NDArray[np.bool_] | None = None, radius: int = RADIUS, workers: int = 1
) -> Copies:
    """Copies among the samples of a manifest that has fingerprints (`columns.add_fingerprints`). A sample without a
    picture is a copy of nothing, one that does not decode has the copies of its bytes alone.

    Args:
        manifest: held in memory by its fingerprints, 270 bytes a row.
        among: bool [N], the rows that are compared; None is all.
        radius: bits of pHash; 0 to 16.
        workers: threads; they change nothing but the time.

    Raises:
        ConfigError: a radius out of range.
        DataError: as `Manifest.table`.
    """
    looks = _Looks.of(manifest.table(_COLUMNS), np.ones(len(manifest), bool) if among is None else among)
    uids, kept = manifest.uids(), np.arange(len(manifest))
    rows = kept.copy()  # whose fate is open
    while len(edges := _edges(looks, rows, radius, workers)):
        chosen = canonical(components(len(kept), [edges]), uids, looks.pixels)
        rows = np.unique(edges)
        alike = looks.are_copies(rows, chosen[rows], radius)
        kept[rows[alike]] = chosen[rows[alike]]
        rows = rows[~alike]
    return Copies(
        kept=kept,
        is_exact=(looks.images == looks.images[kept]) & (looks.pixels > 0),
        distance=np.bitwise_count(looks.phash ^ looks.phash[kept]).astype(np.int64),
    )


def _edges(looks: _Looks, rows: NDArray[np.int64], radius: int, workers: int) -> Edges:
    """Pairs of copies among some rows, of which all follow."""
    good = rows[looks.is_compared[rows]]
    return np.concatenate([
        _equal(looks.images, rows[looks.pixels[rows] > 0]),
        good[_near(looks.phash[good], looks.colours[good], radius, workers)],
        good[_near(looks.pdq[good], looks.colours[good], PDQ_RADIUS, workers)],
    ])  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Looks:
    """The fingerprints of N rows. `pixels` int64 [N], 0 of what is compared with nothing; `images`, `phash` uint64 [N];
    `pdq` uint64 [N, 4]; `colours` uint8 [N, 192]; `is_compared` bool [N]: by more than its bytes."""

    pixels: NDArray[np.int64]
    images: NDArray[np.uint64]
    phash: NDArray[np.uint64]
    pdq: NDArray[np.uint64]
    colours: NDArray[np.uint8]
    is_compared: NDArray[np.bool_]

    @staticmethod
    def of(table: pa.Table, among: NDArray[np.bool_]) -> _Looks:
        pixels = _numbers(table, "width", np.int64) * _numbers(table, "height", np.int64) * among
        return _Looks(
            pixels=pixels,
            images=_numbers(table, "image_hash", np.uint64),
            phash=_numbers(table, "phash", np.uint64),
            pdq=_bytes(table, "pdq", 32).view(np.uint64),
            colours=_bytes(table, "colours", COLOUR_BYTES),
            is_compared=(pixels > 0) & (_numbers(table, "quality", np.int64) >= LEAST_QUALITY),
        )

    def are_copies(self, first: NDArray[np.int64], second: NDArray[np.int64], radius: int) -> NDArray[np.bool_]:
        """bool [n]: whether rows `first` and `second` are copies by either rule."""
        are_exact = (self.images[first] == self.images[second]) & (self.pixels[first] > 0)
        bits = np.bitwise_count(self.phash[first] ^ self.phash[second])
        pdq_bits = np.bitwise_count(self.pdq[first] ^ self.pdq[second]).sum(axis=1, dtype=np.int64)
        are_near = self.is_compared[first] & self.is_compared[second] & ((bits <= radius) | (pdq_bits <= PDQ_RADIUS))
        near = np.flatnonzero(are_near)
        are_near[near] = _alike(self.colours, first[near], second[near])
        return are_exact | are_near | (first == second)


def _numbers(table: pa.Table, name: str, kind: type) -> NDArray[Any]:
    """A column, 0 where it is null."""
    return table[name].fill_null(0).to_numpy().astype(kind)


def _bytes(table: pa.Table, name: str, size: int) -> NDArray[np.uint8]:
    """A column of `size` bytes, zeros where it is null: uint8 [N, size]."""
    return np.frombuffer(packed(table[name].fill_null(bytes(size))), np.uint8).reshape(-1, size)


def _equal(hashes: NDArray[np.uint64], rows: NDArray[np.int64]) -> Edges:
    """Of `rows` with one hash each is joined to the first."""
    _, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    edges = np.stack([rows[first[group]], rows], axis=1)
    return edges[edges[:, 0] != edges[:, 1]]


def _near(codes: NDArray[np.uint64], colours: NDArray[np.uint8], radius: int, workers: int) -> Edges:
    """Pairs of near codes and colours. Rows that are equal in both are joined to the first of them, and only this one
    to others."""
    if not len(codes):
        return np.empty((0, 2), np.int64)
    words = codes.reshape(len(codes), -1)
    both = np.ascontiguousarray(np.concatenate([words.view(np.uint8), colours], axis=1))
    _, first, group = np.unique(_as_items(both), return_index=True, return_inverse=True)
    equal = np.stack([first[group], np.arange(len(codes))], axis=1)
    of_code = np.argsort(_as_items(np.ascontiguousarray(words[first])), kind="stable")
    distinct = first[of_code]  # rows that differ in code or colours, those of one code together
    heads = np.flatnonzero(np.concatenate([[True], (words[distinct[1:]] != words[distinct[:-1]]).any(axis=1)]))
    sizes = np.diff(np.append(heads, len(distinct)))
    pairs = pairs_within(codes[distinct[heads]], radius, workers=workers).rows.astype(np.int64)
    itself = np.flatnonzero(sizes > 1)
    pairs = np.concatenate([pairs, np.stack([itself, itself], axis=1)])
    rows = (distinct[places] for places in _products(heads, sizes, pairs))
    found = [some[_alike(colours, some[:, 0], some[:, 1])] for some in rows]
    return np.concatenate([equal[equal[:, 0] != equal[:, 1]], *found])


def _as_items(rows: NDArray[Any]) -> NDArray[np.void]:
    """[N, n] as N items that compare by their bytes."""
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)


def _alike(colours: NDArray[np.uint8], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n]: whether no colour of the rows differs by more than is let pass."""
    are = np.empty(len(first), bool)
    for start in range(0, len(first), _CHUNK):
        left, right = (colours[rows[start : start + _CHUNK]].astype(np.int16) for rows in (first, second))
        are[start : start + _CHUNK] = (np.abs(left - right) <= COLOUR_TOLERANCE).all(axis=1)
    return are


def _products(heads: NDArray[np.int64], sizes: NDArray[np.int64], pairs: Edges) -> Iterator[Edges]:
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
