"""Clusters of rows joined by edges, and the member of each that stands for it.

Rows are joined by hooking the larger of two roots to the smaller, and by pointer jumping to the roots; see Liu and
Tarjan, Simple Concurrent Labeling Algorithms for Connected Components (https://arxiv.org/abs/1812.06177).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.errors import ConfigError

BLOCK = 1 << 20  # edges or rows worked on at once
UID_BYTES = 16


def components(num_rows: int, edges: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """The smallest row of the cluster of each row; rows without an edge are their own cluster.

    It does not depend on the order of the edges, on their direction, or on how they are cut into blocks.

    Args:
        num_rows: N.
        edges: blocks of pairs of rows, any integers [E, 2]; held one at a time, besides 4 bytes a row (8 from 2 ** 31
            rows on).

    Returns:
        int32 [N], int64 from 2 ** 31 rows on.

    Raises:
        ConfigError: an edge of a row that is not there.
    """
    parents = np.arange(num_rows, dtype=np.int32 if num_rows < 1 << 31 else np.int64)
    for block in edges:
        for start in range(0, len(block), BLOCK):
            _join(parents, np.asarray(block[start : start + BLOCK]))
    for start in range(0, num_rows, BLOCK):  # parents are smaller rows: those of earlier blocks are roots by now
        parents[start : start + BLOCK] = _roots(parents, np.arange(start, min(start + BLOCK, num_rows)))
    return parents


def _join(parents: NDArray[Any], block: NDArray[Any]) -> None:
    if len(block) and (block.min() < 0 or block.max() >= len(parents)):
        got = f"edges between rows {block.min()} and {block.max()}"
        raise ConfigError("an edge names a row that is not there", got=got, allowed=f"0 to {len(parents) - 1}")
    left, right = block[:, 0].astype(np.int64), block[:, 1].astype(np.int64)
    while len(left):
        left, right = _roots(parents, left), _roots(parents, right)
        apart = np.flatnonzero(left != right)
        left, right = left.take(apart), right.take(apart)
        # a root that several edges hook goes to the smallest of them; the next round joins the others
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right).astype(parents.dtype))


def _roots(parents: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The root of each row [R]; the rows then point to their roots."""
    roots = parents.take(rows)
    while not np.array_equal(above := parents.take(roots), roots):
        parents[rows] = roots = above  # at once: the next step then goes twice as far
    return roots.astype(np.int64)


def canonical(
    clusters: NDArray[Any], uids: NDArray[np.uint8], preference: NDArray[Any] | None = None
) -> NDArray[np.int64]:
    """The row that stands for the cluster of each row: the most preferred, of several such the one of smallest uid.

    Unlike the smallest row, it stays the same when shards are put in another order. Rows of one uid are one sample
    stored twice: of these it is the first row.

    Args:
        clusters: [N], a number for each cluster, as `components` gives.
        uids: uint8 [N, 16]; compared as bytes.
        preference: [N], larger first, such as numbers of pixels; none: all rows are alike. Compared as float64;
            NaN comes last.

    Returns:
        int64 [N], a row of the same cluster for each row.

    Raises:
        ConfigError: arrays of other shapes.
    """
    num_rows = len(clusters)
    if uids.shape != (num_rows, UID_BYTES) or uids.dtype != np.uint8:
        got, allowed = f"{uids.dtype} {list(uids.shape)}", f"uint8 [{num_rows}, {UID_BYTES}]"
        raise ConfigError("the uids do not fit the clusters", got=got, allowed=allowed)
    if preference is not None and preference.shape != (num_rows,):
        raise ConfigError("the preference does not fit the clusters", got=list(preference.shape), allowed=[num_rows])
    chosen = np.arange(num_rows)
    members = _members(clusters)
    keys = [*uid_words(uids[members]), clusters[members]]
    if preference is not None:
        keys.insert(2, -preference[members].astype(np.float64))
    order = np.lexsort(keys)
    ordered, rows = clusters[members[order]], members[order]
    heads = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(rows) else order
    lengths = np.diff(np.append(heads, len(rows)))
    chosen[rows] = np.repeat(rows[heads], lengths)
    return chosen


def uid_words(uids: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The low and the high half of uids [N, 16], so that `np.lexsort` of both sorts them as bytes are sorted."""
    halves = np.ascontiguousarray(uids).view(">u8").astype(np.uint64)
    return halves[:, 1], halves[:, 0]


def _members(clusters: NDArray[Any]) -> NDArray[np.int64]:
    """Rows that share their cluster with another row."""
    order = np.argsort(clusters, kind="stable")
    same = clusters[order[1:]] == clusters[order[:-1]]
    shared = np.zeros(len(clusters), np.bool_)
    shared[order[1:][same]] = shared[order[:-1][same]] = True
    return np.flatnonzero(shared)
