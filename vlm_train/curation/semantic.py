"""Semantic deduplication (Abbas et al., "SemDeDup", 2023, arXiv 2303.09540): what lies too near to another is removed.

The rows of a cluster stand in an order, and a row is removed when its cosine with a row before it is above 1 - eps.
Two readings of the rule:

    paper    the row before it may be removed itself, as published. A row's largest cosine then says for every eps at
             once whether it goes: `nearest_of` and `Nearest.removed`
    leader   the row before it must be kept. Of a chain a-b-c whose ends are not near, `paper` loses b and c, `leader`
             only b; but it depends on eps: `pairs_of` and `removed_by_leaders`

Near rows that a border of clusters divides are never compared by the published way. Here each row also looks into the
clusters whose centroids are next in nearness (`num_probed` of `kmeans.spherical`; 1 is the published way). Two rows are
compared when one of them looks into the cluster of the other; which of them stands before is decided as in a cluster,
by the distance from the own centroid.

Cosines are formed exactly of rows on a grid (`kmeans`) and rounded once to float32: they differ from those of the
rows in float64 by less than 1e-7 for usual rows, by sqrt(D) * 2^-25 + 2^-25 at worst (7e-7 at 512 numbers), and have
the same bits whatever the threads, blocks, device and order of rows. Rows that are kept in float16 move them by more:
3e-5 at 512 numbers, 1e-4 at 64.

A large cluster is compared in blocks with a running maximum, not split: a second k-means would compare fewer pairs, and
the rule would no longer be the published one. Memory is a block, time the square of a cluster; so remove equal pictures
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_train.curation.kmeans import BLOCK, Clusters, Embeddings, Uids, uid_order, unit_rows
from vlm_train.errors import ConfigError

Keep = Literal["hard", "easy"]
"""Which of near rows stays: the farthest from its centroid (the published default), or the nearest."""

_FINEST = 1e-6  # below it the rounding of rows decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """Of each row the nearest row that stands before it.

    Args:
        similarity: float32 [N], the largest cosine; -inf where nothing it was compared with stands before it.
        match: int64 [N], the row of that cosine, of equal ones that which stands first; -1 where there is none.
    """

    similarity: NDArray[np.float32]
    match: NDArray[np.int64]

    def removed(self, eps: float) -> NDArray[np.bool_]:
        """bool [N], what the rule `paper` removes.

        Raises:
            ConfigError: an eps that is finer than cosines are, or that would remove what has nothing in common.
        """
        check_eps(eps)
        return self.similarity.astype(np.float64) > 1 - eps  # in float32, 1 - eps would be rounded


def nearest_of(
    embeddings: Embeddings, uids: Uids, clusters: Clusters, *, keep: Keep = "hard", device: str = "cpu"
) -> Nearest:
    """For every row its nearest of the rows it is compared with that stand before it.

    Args:
        embeddings: float16 or float32 [N, D], unit rows, in memory or memory-mapped.
        uids: uint8 [N, 16]; they decide between rows that are equally far from their centroids.
        clusters: of the same rows, by `kmeans.spherical`.

    Raises:
        ConfigError: clusters of another number of rows.
        DataError: a row that is not finite or not of length 1.
    """
    order = _standing(embeddings, uids, clusters, keep)
    similarity, match = np.full(len(order), -math.inf, np.float32), np.full(len(order), -1)
    for queries, keys, cosines in _tiles(embeddings, clusters.nearest[order], order, device):
        before = _before(keys, queries, device)
        _raise_to(similarity, match, queries, keys, cosines.where(before, -math.inf))
        after = _before(queries, keys, device).T
        _raise_to(similarity, match, keys, queries, cosines.where(after, -math.inf).T)
    back = order.argsort()
    return Nearest(similarity=similarity[back], match=np.where(match < 0, -1, order[match])[back])


def pairs_of(
    embeddings: Embeddings,
    uids: Uids,
    clusters: Clusters,
    eps: float,
    *,
    keep: Keep = "hard",
    device: str = "cpu",
    max_pairs: int = 100_000_000,
) -> NDArray[np.int64]:
    """int64 [M, 2]: (row that stands before, row that stands after) of all compared rows whose cosine is above 1 - eps.

    Each pair once. Memory: 32 bytes a pair at most. Arguments and errors as `nearest_of`.

    Raises:
        ConfigError: `max_pairs` is exceeded.
    """
    check_eps(eps)
    order = _standing(embeddings, uids, clusters, keep)
    num_rows, found, num_found = len(order), [np.empty(0, np.int64)], 0
    for queries, keys, cosines in _tiles(embeddings, clusters.nearest[order], order, device):
        query, key = (cosines.double() > 1 - eps).cpu().numpy().nonzero()
        first, second = queries[query], keys[key]
        codes = np.minimum(first, second) * num_rows + np.maximum(first, second)
        found.append(np.unique(codes[first != second]))  # rows may look into each other's clusters
        num_found += len(found[-1])
        if num_found > max_pairs:
            raise ConfigError(
                f"too many rows are nearer to each other than eps {eps:g}",
                got=f"more than {max_pairs} pairs",
                remedy="remove equal pictures first, or give a smaller eps, a larger max_pairs or the rule paper",
            )
    codes = np.unique(np.concatenate(found))
    return np.stack([order[codes // num_rows], order[codes % num_rows]], axis=1)


def removed_by_leaders(pairs: NDArray[np.int64], num_rows: int) -> NDArray[np.bool_]:
    """bool [N], what the rule `leader` removes: each row that is near to a kept row before it.

    Args:
        pairs: int64 [M, 2] of `pairs_of`.

    Rows with nothing undecided before them are kept and what is near to them goes, in rounds: as many as the longest
    chain of rows that decide about each other is long.
    """
    removed = np.zeros(num_rows, bool)
    before, after = pairs[:, 0], pairs[:, 1]
    while len(before):
        undecided = np.zeros(num_rows, bool)
        undecided[after] = True
        removed[after[~undecided[before]]] = True
        left = ~(removed[before] | removed[after])
        before, after = before[left], after[left]
    return removed


def nearest_leaders(
    embeddings: Embeddings, pairs: NDArray[np.int64], removed: NDArray[np.bool_], *, device: str = "cpu"
) -> Nearest:
    """For every removed row its nearest of the kept rows that stand before it; nothing for the others.

    Args:
        embeddings: as in `nearest_of`.
        pairs: int64 [M, 2] of `pairs_of`.
        removed: bool [N], what `removed_by_leaders` makes of them.
    """
    similarity, match = np.full(len(removed), -math.inf, np.float32), np.full(len(removed), -1)
    deciding = pairs[~removed[pairs[:, 0]] & removed[pairs[:, 1]]]
    for start in range(0, len(deciding), BLOCK):
        before, after = deciding[start : start + BLOCK].T
        rows_ND, leaders_ND = (unit_rows(embeddings, rows, device) for rows in (after, before))
        cosine = (rows_ND * leaders_ND).sum(dim=1).float().cpu().numpy()
        for row, leader, value in zip(after.tolist(), before.tolist(), cosine, strict=True):
            if value > similarity[row]:  # pairs come in the order of the rows before: of equals the first stays
                similarity[row], match[row] = value, leader
    return Nearest(similarity=similarity, match=match)


def check_eps(eps: float) -> None:
    """Refuses an eps that cannot be meant.

    Raises:
        ConfigError: it is below 1e-6 or not below 1.
    """
    if not _FINEST <= eps < 1:
        raise ConfigError(
            "eps is the distance 1 - cosine below which rows are duplicates", got=eps, allowed=f"{_FINEST:g} to 1"
        )


def _standing(embeddings: Embeddings, uids: Uids, clusters: Clusters, keep: Keep) -> NDArray[np.int64]:
    """The rows in one order, of which the order of every cluster is a part. From here on rows are places in it."""
    if not len(embeddings) == len(uids) == len(clusters.nearest):
        raise ConfigError(
            "embeddings, uids and clusters are not of the same rows",
            got=f"{len(embeddings)}, {len(uids)} and {len(clusters.nearest)} rows",
        )
    if keep not in ("hard", "easy"):
        raise ConfigError("an unknown choice of what stays of near rows", got=keep, allowed="hard or easy")
    return uid_order(uids, clusters.cosine if keep == "hard" else -clusters.cosine)


def _tiles(
    embeddings: Embeddings, nearest: NDArray[np.int32], order: NDArray[np.int64], device: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]]:
    """(queries [q], keys [k], cosines float32 [q, k]) of all rows that are compared; both ascend.

    Keys are rows of a cluster, queries its rows from the first of the keys on and the rows of others that look into it.
    """
    num_clusters = int(nearest.max()) + 1
    members, visitors = _grouped(nearest[:, :1], num_clusters), _grouped(nearest[:, 1:], num_clusters)
    for inside, outside in zip(members, visitors, strict=True):
        for start in range(0, len(inside), BLOCK):
            keys = inside[start : start + BLOCK]
            keys_ND = unit_rows(embeddings, order[keys], device)
            looking = np.union1d(inside[start:], outside)
            for first in range(0, len(looking), BLOCK):
                queries = looking[first : first + BLOCK]
                yield queries, keys, (unit_rows(embeddings, order[queries], device) @ keys_ND.T).float()


def _grouped(numbers: NDArray[np.int32], num_clusters: int) -> list[NDArray[np.int64]]:
    """For each cluster the rows of `numbers` [N, P] that name it, ascending."""
    flat = numbers.ravel()
    rows = flat.argsort(kind="stable") // max(1, numbers.shape[1])
    return np.split(rows, np.bincount(flat, minlength=num_clusters).cumsum()[:-1])


def _before(first: NDArray[np.int64], second: NDArray[np.int64], device: str) -> Tensor:
    """bool [second, first]: whether the first stands before the second."""
    return torch.from_numpy(first[None, :] < second[:, None]).to(device)


def _raise_to(
    similarity: NDArray[np.float32],
    match: NDArray[np.int64],
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
    cosines: Tensor,
) -> None:
    """Takes what is nearer than was known of `rows`, and of equally near rows that which stands first."""
    largest, place = cosines.max(dim=1)
    value, found = largest.cpu().numpy(), others[place.cpu().numpy()]
    better = (value > similarity[rows]) | ((value == similarity[rows]) & (found < match[rows]))
    similarity[rows[better]], match[rows[better]] = value[better], found[better]
