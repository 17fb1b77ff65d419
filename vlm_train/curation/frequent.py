"""Entries to balance by where there is no list of them: words and pairs of words that many captions hold.

They are counted by hashes of 64 bits, 16 bytes for each different one, as there are many more than samples; only those
that are frequent are then called by name.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation.caption_parts import CaptionPart
from vlm_train.curation.engines import Engine
from vlm_train.curation.entries import Entries, words_of
from vlm_train.errors import DataError

_MERGED = 1 << 24  # hashes that are held before equal ones are added up

Counts = tuple[NDArray[np.uint64], NDArray[np.int64]]
"""(hashes, ascending, each once; in how many captions each stands)."""


def find_entries(parts: Sequence[CaptionPart], engine: Engine, min_count: int) -> Entries:
    """Words, and pairs of neighbouring words, that stand in `min_count` captions at least; words have a letter or a
    digit. Neither the order of the parts nor the engine matters.

    Raises:
        DataError: no word stands in so many.
    """
    found: list[Counts] = []
    for counts in engine.map(_count, parts):
        found.append(counts)
        if sum(len(hashes) for hashes, _ in found) > _MERGED:
            found = [_merged(found)]
    hashes, counts = _merged(found)
    often = hashes[counts >= min_count]
    names = {name for some in engine.map(_names, [_Often(part, often) for part in parts]) for name in some}
    if not names:
        raise DataError("no word stands in so many captions", got=f"min_count {min_count}",
                        allowed=f"up to {counts.max(initial=0)}", remedy="lower min_count")  # fmt: skip
    return Entries.of(sorted(names))


@dataclass(frozen=True, slots=True, eq=False)
class _Often:
    """Rows of a part, and the hashes of what is frequent, ascending."""

    part: CaptionPart
    hashes: NDArray[np.uint64]


def _merged(counts: Sequence[Counts]) -> Counts:
    hashes = np.concatenate([np.empty(0, np.uint64), *(each for each, _ in counts)])
    numbers = np.concatenate([np.empty(0, np.int64), *(each for _, each in counts)])
    order = np.argsort(hashes, kind="stable")
    hashes, numbers = hashes[order], numbers[order]
    heads = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else order
    return hashes[heads], np.add.reduceat(numbers, heads) if len(heads) else numbers


def _grams(part: CaptionPart) -> Counter[str]:
    """In how many captions each word and each pair stands."""
    found: Counter[str] = Counter()
    for caption in part.captions():
        words = words_of(caption or "")
        solid = {word for word in words if any(letter.isalnum() for letter in word)}
        found.update(solid | {f"{one} {two}" for one, two in pairwise(words) if one in solid and two in solid})
    return found


def _hashes(names: Sequence[str]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _count(part: CaptionPart) -> Counts:
    grams = _grams(part)
    return _merged([(_hashes(list(grams)), np.array(list(grams.values()), np.int64))])


def _names(item: _Often) -> list[str]:
    names = list(_grams(item.part))
    is_often = np.isin(_hashes(names), item.hashes)
    return [name for name, often in zip(names, is_often.tolist(), strict=True) if often]
