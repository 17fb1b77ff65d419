"""Which short texts may be alike: MinHash of their 5-grams of characters, in bands (Broder, "On the resemblance and
containment of documents", 1997; Leskovec et al., "Mining of Massive Datasets", chapter 3).

Two texts whose sets of 5-grams have Jaccard similarity s share one of 112 minima with probability s, all 8 of a band
with s^8, and at least one of 14 bands with 1 - (1 - s^8)^14: 0.57 at s = 0.7, 0.92 at 0.8, 0.9996 at 0.9. So a band
says which texts to compare, and `similarity` whether they are alike. Captions are too short for 5-grams of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.order import derive, mix

GRAM = 5
NUM_BANDS, NUM_ROWS = 14, 8
VERSION = "1"
"""Of the bands; those of another version meet other texts."""

_SCATTER = np.uint64(0x9E3779B97F4A7C15)
_KEYS, _FACTORS = derive(0, np.arange(2 * NUM_BANDS * NUM_ROWS, dtype=np.uint64)).reshape(2, NUM_BANDS, NUM_ROWS)
_FACTORS |= np.uint64(1)
_HIGH = np.uint64(32)
_BITS = np.uint64(48)
_MASK = (np.uint64(1) << _BITS) - np.uint64(1)
_MOST = 1 << 16  # texts, or pairs of them, whose number goes before a hash
_BLOCK = 512  # texts whose 5-grams are hashed while they lie in the cache

Sets = tuple[NDArray[np.uint64], NDArray[np.int64]]
"""Hashes of 48 bits of all 5-grams, those of text i ascending at [starts[i], starts[i + 1])."""


def gram_sets(texts: Sequence[str]) -> Sets:
    """The 5-grams of texts, each once in a text; a shorter text is one gram. Of a thousand billion pairs of texts with
    sixty grams each a dozen share a hash of different grams."""
    blocks = [_gram_sets(texts[start : start + _MOST]) for start in range(0, len(texts), _MOST)]
    hashes, sizes = [each for each, _ in blocks], [each for _, each in blocks]
    starts = np.concatenate([[0], *sizes]).cumsum()
    return np.concatenate([np.empty(0, np.uint64), *hashes]), starts.astype(np.int64)


def _gram_sets(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hashes, how many each text has)."""
    padded = [text.ljust(GRAM, "\0") for text in texts]
    lengths = np.array([len(text) for text in padded])
    points = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    owner = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths)
    hashes = np.zeros(len(points) - (GRAM - 1), np.uint64)
    for offset in range(GRAM):
        hashes = mix(hashes + points[offset : offset + len(hashes)] + _SCATTER)
    is_whole = owner[GRAM - 1 :] == owner[: len(hashes)]  # not one that goes over into the next text
    keyed = np.sort(_keyed(owner[: len(hashes)][is_whole], hashes[is_whole] >> (np.uint64(64) - _BITS)))
    keyed = keyed[np.concatenate([[True], keyed[1:] != keyed[:-1]])]
    return keyed & _MASK, np.bincount((keyed >> _BITS).astype(np.int64), minlength=len(texts))


def _keyed(owner: NDArray[Any], hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Owner and hash as one number, which sorts several times as fast as the two."""
    return (owner.astype(np.uint64) << _BITS) | hashes


def bands(sets: Sets) -> NDArray[np.uint32]:
    """uint32 [n, 14]: a hash of each band of each set. Different bands have one hash with probability 2^-32; who takes
    candidates by them compares the texts.

    The k-th minimum is over (hash xor key_k) * factor_k mod 2^64, its upper half, with odd factors. Without the keys
    some of the 112 orders would depend on each other, where one factor is about a small multiple of another.
    """
    hashes, starts = sets
    found = np.empty((len(starts) - 1, NUM_BANDS), np.uint32)
    for first in range(0, len(found), _BLOCK):
        last = min(first + _BLOCK, len(found))
        block, heads = hashes[starts[first] : starts[last]], starts[first:last] - starts[first]
        for band in range(NUM_BANDS):
            key = np.zeros(last - first, np.uint64)
            for number in range(NUM_ROWS):
                least = np.minimum.reduceat(_ordered(block, band, number), heads)
                key = mix(key + (least >> _HIGH) + _SCATTER)
            found[first:last, band] = key >> _HIGH
    return found


def _ordered(hashes: NDArray[np.uint64], band: int, number: int) -> NDArray[np.uint64]:
    """The hashes as one of the minima orders them."""
    return (hashes ^ _KEYS[band, number]) * _FACTORS[band, number]


def similarity(first: Sets, second: Sets) -> NDArray[np.float64]:
    """float64 [n]: Jaccard similarity of the i-th set of one side with the i-th of the other; n up to 2^16."""
    sizes = [np.diff(starts) for _, starts in (first, second)]
    pair = np.concatenate([np.repeat(np.arange(len(size)), size) for size in sizes])
    keyed = np.sort(_keyed(pair, np.concatenate([first[0], second[0]])))
    twice = keyed[1:][keyed[1:] == keyed[:-1]]  # a set holds a hash once
    shared = np.bincount((twice >> _BITS).astype(np.int64), minlength=len(sizes[0]))
    return shared / (sizes[0] + sizes[1] - shared)


def chosen(sets: Sets, places: NDArray[np.int64]) -> Sets:
    """The sets at `places` [n], in that order."""
    hashes, starts = sets
    sizes = np.diff(starts)[places]
    ends = np.cumsum(sizes)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
    return hashes[np.repeat(starts[places], sizes) + within], np.concatenate([[0], ends])
