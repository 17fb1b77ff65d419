"""Groups of texts round leaders: each text either leads, or is alike to its leader, so that no chain of small steps
joins what is not alike.

Texts stand in an order. One leads unless a leader before it is alike to it; otherwise it belongs to the first such
leader. Two texts are compared only where they share the hash of a band (`minhash`), and there with the first
`MOST_LEADERS` leaders only: a sentence in which nothing but a long name changes may be in a hundred thousand texts that
are all unlike. Apart from that it is the greedy maximal independent set of the texts in their order, found in rounds,
all texts at once that have nothing undecided before them (Blelloch et al., "Greedy sequential maximal independent set
and matching are parallel on average", 2012).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MOST_LEADERS = 100
"""Of those with one hash of a band; what comes after so many is not compared there any longer."""

Alike = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
"""Of texts `first` [n] and `second` [n], whether they are alike [n]."""


def candidates(bands: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(bucket [E], text [E]): who has the hash of which band, where more than one has it; ordered by both.

    Args:
        bands: uint32 [U, B].
    """
    buckets, texts, num = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for column in bands.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        heads = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(order) else np.empty(0, bool)
        bucket = np.cumsum(heads) - 1
        is_shared = np.bincount(bucket)[bucket] > 1 if len(order) else heads
        _, bucket = np.unique(bucket[is_shared], return_inverse=True)
        buckets.append(bucket + num)
        texts.append(order[is_shared])
        num += int(bucket[-1]) + 1 if len(bucket) else 0
    return np.concatenate(buckets), np.concatenate(texts)


def led(
    num_texts: int, buckets: NDArray[np.int64], texts: NDArray[np.int64], alike: Alike, most: int = MOST_LEADERS
) -> tuple[NDArray[np.int64], int]:
    """(leader of each text [U], itself where it leads; how many buckets have had `most` leaders).

    Args:
        num_texts: U; texts are numbered in their order.
        buckets, texts: of `candidates`.
        alike: is asked once at most of a pair.
        most: leaders of a bucket.
    """
    leader, is_open = np.full(num_texts, num_texts), np.ones(num_texts, bool)
    num_leaders = np.zeros(int(buckets[-1]) + 1 if len(buckets) else 0, np.int64)
    while len(texts):  # a bucket stays as long as something is undecided in it
        open_places = np.flatnonzero(is_open[texts])
        first = np.ones(len(open_places), bool)  # the first undecided one of its bucket
        first[1:] = buckets[open_places[1:]] != buckets[open_places[:-1]]
        num_buckets = np.bincount(texts[open_places], minlength=num_texts)
        num_first = np.bincount(texts[open_places[first]], minlength=num_texts)
        leads = (num_first == num_buckets) & (num_first > 0)
        heads = open_places[first][leads[texts[open_places[first]]]]
        ahead, behind = _pairs(buckets, texts, heads)
        better = ahead < leader[behind]
        pairs = np.unique(np.stack([ahead[better], behind[better]], axis=1), axis=0)
        pairs = pairs[alike(pairs[:, 0], pairs[:, 1])]
        np.minimum.at(leader, pairs[:, 1], pairs[:, 0])
        is_open[pairs[:, 1]] = is_open[leads] = False
        leader[leads] = np.flatnonzero(leads)
        num_leaders[buckets[heads]] += 1
        still_open = np.bincount(buckets[is_open[texts]], minlength=len(num_leaders)) > 0
        still_open &= num_leaders < most
        left = ~leads[texts] & still_open[buckets]
        buckets, texts = buckets[left], texts[left]
    return np.where(leader == num_texts, np.arange(num_texts), leader), int((num_leaders >= most).sum())


def _pairs(
    buckets: NDArray[np.int64], texts: NDArray[np.int64], heads: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(text at a head, text behind it in its bucket) of all heads, which are places; at most one head a bucket."""
    ends = np.searchsorted(buckets, buckets[heads], side="right")
    sizes = ends - heads - 1
    behind = np.repeat(heads + 1 - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))
    return np.repeat(texts[heads], sizes), texts[behind]
