"""Which pictures of a dataset are copies of each other: byte for byte, or as far as their thumbnails tell.

*exact*: the images of two samples have the same bytes. *near*, *cropped*, *covered*: their thumbnails show the same
picture, the same with its edges cut off, the same but for one box (`alignment`); the first of these that holds. Only
`candidates` are looked at. Pictures of a quality below `LEAST_QUALITY` are compared by their bytes alone: flat ones all
look the same. Nothing is turned: a mirrored picture is another one.

Of each cluster the sample with the most pixels is kept, of equals one that is not covered, of these that with the most
copies, of these that of the least uid. What is a copy of that one is dropped. What is only a copy of its copies is not:
among the rest the same is done again, so that no chain of small differences drops a picture that nothing kept is like.
Neither the order of the shards nor the number of workers decides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.curation import alignment
from vlm_train.curation.candidates import Pairs, Parts, candidates, column_of
from vlm_train.curation.chain import Ticking
from vlm_train.curation.clusters import canonical, components
from vlm_train.curation.views import THUMBNAIL_BYTES
from vlm_train.data.manifest import Manifest

LEAST_QUALITY = 5
"""Of a fingerprint that is compared. Meta's advice for PDQ is 50; thumbnails are compared here, and drawings and
diagrams have less."""

RADIUS, MOST_BITS = 4, 16
"""Bits of 64, where nobody says otherwise, and at most."""

RULES = EXACT, NEAR, CROPPED, COVERED = "exact", "near", "cropped", "covered"
_EXACT, _NEAR, _CROPPED, _COVERED = range(4)
_NONE, _FIRST, _SECOND = 255, 64, 32
_COLUMNS = ("width", "height", "image_hash", "phash", "quality", "thumbnail_hash")
_MANY = 1 << 20  # copies
_CHUNK = 512  # pairs whose thumbnails are compared at a time

Test = Callable[[alignment.Thumbnails, alignment.Thumbnails], NDArray[np.uint8]]
"""As `rules_of`."""


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """What is a copy of what.

    `kept` int64 [N]: for each row the one that stays and that it is a copy of; itself where it stays.
    `rule` uint8 [N]: place in `RULES` of what makes it one, 0 where it stays.
    `distance` int64 [N]: bits by which its pHash differs from that of the kept one, 0 without a picture.
    """

    kept: NDArray[np.int64]
    rule: NDArray[np.uint8]
    distance: NDArray[np.int64]

    @property
    def is_kept(self) -> NDArray[np.bool_]:
        """bool [N]: the rows that stay."""
        return self.kept == np.arange(len(self.kept))


def find_copies(
    manifest: Manifest,
    *,
    among: NDArray[np.bool_] | None = None,
    radius: int = RADIUS,
    covered: bool = True,
    tolerance: float = 1.0,
    workers: int = 1,
    ticking: Ticking = lambda noun: lambda done, total: None,
) -> Copies:
    """Copies among the samples of a manifest that has fingerprints (`columns.FINGERPRINT`). A sample without a
    picture is a copy of nothing, one that does not decode has the copies of its bytes alone.

    In memory are 80 bytes a row, 40 bytes a candidate, and what the search holds at once (`pairs_within`); views and
    the thumbnails of candidates lie in temporary files.

    Args:
        manifest: its shards are not read.
        among: bool [N], the rows that are compared; None is all.
        radius: bits of pHash within which pictures are candidates whatever their views say; 0 to 16.
        covered: whether the rule `covered` is used.
        tolerance: how much thumbnails may differ, in multiples of what is measured (`alignment`).
        workers: threads; they change nothing but the time.
        ticking: of the search, and of the candidates that are compared.

    Raises:
        ConfigError: a radius out of range.
        DataError: as `Manifest.table`.
    """
    looks = _Looks.of(manifest.table(_COLUMNS), np.ones(len(manifest), bool) if among is None else among)
    best = looks.best(manifest)
    heads = np.flatnonzero((best == np.arange(len(best))) & looks.is_compared)
    pairs = candidates(
        manifest, heads, looks.phash[heads], radius=radius, with_parts=covered, workers=workers, ticking=ticking
    )
    test = partial(rules_of, covered=covered, tolerance=tolerance)
    rules = np.concatenate([np.empty(0, np.uint8), *_compared(manifest, heads, pairs, test, workers, ticking)])
    pairs, rules = pairs[rules != _NONE], rules[rules != _NONE]
    chosen, rule = _settled(pairs, rules, manifest.uids(heads), looks.pixels[heads])
    kept, found = best.copy(), np.full(len(best), _NEAR, np.uint8)
    kept[heads], found[heads] = heads[chosen], rule
    kept, found = kept[best], found[best]  # a row goes where the best of those that look as it does goes
    found[looks.images == looks.images[kept]] = _EXACT
    return Copies(
        kept=kept,
        rule=found,
        distance=np.bitwise_count(looks.phash ^ looks.phash[kept]).astype(np.int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """Pictures of one manifest that are copies of those of another.

    `rows` int64 [P, 2], rising: a row of each; `is_exact` bool [P]: whether their images have the same bytes;
    `distance` int64 [P]: bits by which their pHashes differ.
    """

    rows: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    distance: NDArray[np.int64]


def pairs_between(
    manifest: Manifest,
    other: Manifest,
    *,
    radius: int = RADIUS,
    workers: int = 1,
    ticking: Ticking = lambda noun: lambda done, total: None,
) -> Shared:
    """All pairs of a sample of one manifest and one of another that are copies by any rule; both have
    fingerprints. Memory, arguments and errors as of `find_copies`."""
    both, num = _Both(manifest, other), len(manifest)
    looks = _Looks.of(both.table(_COLUMNS), np.ones(num + len(other), bool))
    rows = np.flatnonzero(looks.is_compared)
    pairs = candidates(both, rows, looks.phash[rows], radius=radius, with_parts=True, workers=workers, ticking=ticking)
    pairs = pairs[(rows[pairs[:, 0]] < num) & (rows[pairs[:, 1]] >= num)]
    rules = np.concatenate([np.empty(0, np.uint8), *_compared(both, rows, pairs, rules_of, workers, ticking)])
    seen, found = np.flatnonzero(looks.pixels > 0), [rows[pairs[rules != _NONE]]]
    order = seen[np.argsort(looks.images[seen], kind="stable")]
    ours, theirs = order[order < num], order[order >= num]
    first, stop = (np.searchsorted(looks.images[theirs], looks.images[ours], side=side) for side in ("left", "right"))
    sizes = stop - first
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(first, sizes)
    found.append(np.stack([np.repeat(ours, sizes), theirs[place]], axis=1))
    joined = np.unique(np.concatenate(found), axis=0)
    one, two = joined.T
    return Shared(
        rows=joined - [0, num],
        is_exact=looks.images[one] == looks.images[two],
        distance=np.bitwise_count(looks.phash[one] ^ looks.phash[two]).astype(np.int64),
    )


class _Both:
    """The rows of two manifests, one behind the other, as candidates are looked for among them."""

    def __init__(self, first: Manifest, second: Manifest) -> None:
        self._manifests = (first, second)
        self.starts = np.concatenate([first.starts, second.starts[1:] + len(first)])

    def table(self, columns: Sequence[str]) -> pa.Table:
        return pa.concat_tables([each.table(columns) for each in self._manifests], promote_options="default")

    def part(self, shard: int, columns: Sequence[str]) -> pa.Table:
        first, second = self._manifests
        num = len(first.starts) - 1
        return first.part(shard, columns) if shard < num else second.part(shard - num, columns)


@dataclass(frozen=True, slots=True, eq=False)
class _Looks:
    """The fingerprints of N rows. `pixels` int64 [N], 0 of what is compared with nothing; `images`, `phash`,
    `thumbnails` uint64 [N]: hashes; `is_compared` bool [N]: by more than its bytes."""

    pixels: NDArray[np.int64]
    images: NDArray[np.uint64]
    phash: NDArray[np.uint64]
    thumbnails: NDArray[np.uint64]
    is_compared: NDArray[np.bool_]

    @staticmethod
    def of(table: pa.Table, among: NDArray[np.bool_]) -> _Looks:
        pixels = _numbers(table, "width", np.int64) * _numbers(table, "height", np.int64) * among
        return _Looks(
            pixels=pixels,
            images=_numbers(table, "image_hash", np.uint64),
            phash=_numbers(table, "phash", np.uint64),
            thumbnails=_numbers(table, "thumbnail_hash", np.uint64),
            is_compared=(pixels > 0) & (_numbers(table, "quality", np.int64) >= LEAST_QUALITY),
        )

    def best(self, manifest: Manifest) -> NDArray[np.int64]:
        """For each row the one to keep of those of the same bytes, or of the same thumbnail where it is compared."""
        best = np.arange(len(self.pixels))
        for rows, hashes in (
            (np.flatnonzero((self.pixels > 0) & ~self.is_compared), self.images),
            (np.flatnonzero(self.is_compared), self.thumbnails),
        ):
            rows = rows[np.argsort(hashes[rows], kind="stable")]
            starts = np.diff(hashes[rows], prepend=0) != 0
            starts[:1] = True
            is_alone = starts & np.append(starts[1:], True)
            group, rows = np.cumsum(starts)[~is_alone], rows[~is_alone]
            best[rows] = rows[canonical(group, manifest.uids(rows), self.pixels[rows])]
        return best


def _numbers(table: pa.Table, name: str, kind: type) -> NDArray[Any]:
    """A column, 0 where it is null."""
    return table[name].fill_null(0).to_numpy().astype(kind)


def _compared(
    manifest: Parts, heads: NDArray[np.int64], pairs: Pairs, test: Test, workers: int, ticking: Ticking
) -> Iterator[NDArray[np.uint8]]:
    """The rule by which each pair of places in `heads` are copies, or `_NONE`, in blocks."""
    places = np.unique(pairs)
    progress = ticking("pairs compared")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        path = Path(folder) / "thumbnails"
        thumbnails = np.memmap(path, np.uint8, "w+", shape=(max(1, len(places)), THUMBNAIL_BYTES))
        for place, found in column_of(manifest, heads[places], "thumbnail", THUMBNAIL_BYTES):
            thumbnails[place] = found

        def one(start: int) -> NDArray[np.uint8]:
            first, second = np.searchsorted(places, pairs[start : start + _CHUNK]).T
            return test(thumbnails[first], thumbnails[second])

        for start in range(0, len(pairs), _CHUNK * workers):
            block = range(start, min(start + _CHUNK * workers, len(pairs)), _CHUNK)
            yield from pool.map(one, block)
            progress(min(start + _CHUNK * workers, len(pairs)), len(pairs))


def rules_of(
    first: alignment.Thumbnails, second: alignment.Thumbnails, covered: bool = True, tolerance: float = 1.0
) -> NDArray[np.uint8]:
    """Place in `RULES` of the first rule by which thumbnails are copies, one by one, 255 where none does; with it
    `_FIRST`, `_SECOND` or both where it is these that are cropped or covered."""
    rules = np.full(len(first), _NONE, np.uint8)
    one, two = alignment.Coarse.of(first), alignment.Coarse.of(second)
    tests = [
        (_NEAR, one.may_be_same(two, tolerance), alignment.are_same),
        (_CROPPED | _SECOND, one.may_be_cropped(two, tolerance), alignment.are_cropped),
        (_CROPPED | _FIRST, two.may_be_cropped(one, tolerance), alignment.are_cropped),
    ]
    if covered:
        may_be = one.may_be_covered(two, tolerance)
        tests += [(_COVERED | changed, may_be, alignment.are_covered) for changed in (_SECOND, _FIRST)]
    for rule, may_be, test in tests:
        rows = np.flatnonzero(may_be & ((rules == _NONE) | (rules % _SECOND == rule % _SECOND)))
        whole, changed = (second, first) if rule & _FIRST else (first, second)
        rows = rows[test(whole[rows], changed[rows], tolerance)]
        rules[rows] = np.where(rules[rows] == _NONE, rule, rules[rows] | rule)
    return rules


def _settled(
    pairs: Pairs, rules: NDArray[np.uint8], uids: NDArray[np.uint8], pixels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """For each of M pictures the one that stays for it, itself where it stays, and by which rule: round by round."""
    kept, rule = np.arange(len(pixels)), np.full(len(pixels), _NEAR, np.uint8)
    is_bare = np.ones(len(pixels), bool)
    for place, changed in enumerate((_FIRST, _SECOND)):  # where it may be either, nothing is said
        is_bare[pairs[rules == _COVERED | changed, place]] = False
    rules = rules % _SECOND
    while len(pairs):
        num_copies = np.minimum(np.bincount(pairs.ravel(), minlength=len(kept)), _MANY - 1)
        rank = (pixels * 2 + is_bare) * _MANY + num_copies
        chosen = canonical(components(len(kept), [pairs]), uids, rank)
        for one, other in (pairs.T, pairs.T[::-1]):
            goes = chosen[one] == other
            kept[one[goes]], rule[one[goes]] = other[goes], rules[goes]
        is_open = (kept == np.arange(len(kept))) & (chosen != np.arange(len(kept)))
        still = is_open[pairs].all(axis=1)
        pairs, rules = pairs[still], rules[still]
    return kept, rule
