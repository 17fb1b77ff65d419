"""The step that thins out dense places among pictures: Density-Based Pruning (Abbas et al., "Effective pruning of
web-scale datasets based on complexity of concept clusters", 2024, arXiv 2401.04578).

Pictures are clustered. The complexity of a cluster is d_intra * d_inter: the mean cosine distance of its rows from its
centroid, times the mean cosine distance of its centroid from the 20 nearest others. Of N rows that are to stay it gets
the share softmax(complexity / temperature), as near as its size allows: least squares with the sum N and between 1 and
all of its rows. What lies farthest from the centroid stays.

It differs from the paper in this: numbers of rows are rounded so that their sum is N to the row, by largest remainders;
a cluster may get none where fewer rows are to stay than there are clusters; the least squares are solved exactly.

The paper removes duplicates first, as everybody should (`data dedup`): copies far from a centroid would all stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation import kmeans
from vlm_train.curation.chain import Found, Settings, Work
from vlm_train.curation.limits import check_number, check_share, check_whole
from vlm_train.curation.ranks import num_of_share
from vlm_train.data.manifest import Manifest

DENSITY = "density"
NUM_NEIGHBOURS = 20
_GRID = 2.0**36


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """Rows by the rule `density`, so that the share `keep` of the rows that `run` can read stays, exactly. The value of
    a row is its cosine distance from the centroid of its cluster.

    `num_clusters`: None is the square root of the number of rows; `temperature`: the higher, the more equal the
    clusters become; the paper has 0.1, for 500 clusters. What the run cannot read stays and is counted.
    """

    run: str
    keep: float
    num_clusters: int | None = None
    temperature: float = 0.1

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        check_share("keep", self.keep)
        if self.num_clusters is not None:
            check_whole("num_clusters", self.num_clusters, low=1)
        check_number("temperature", self.temperature, low=1e-3)  # less lets all but one cluster go
        return {
            "keep": self.keep,
            "num_clusters": self.num_clusters,
            "temperature": self.temperature,
            "model": work.models.identity(self.run),
        }

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        embedded = work.models.embed(manifest, self.run, "image")
        places = np.flatnonzero(among[embedded.rows])
        rows = embedded.rows[places]
        num_unread = int(among.sum()) - len(rows)
        if not len(rows):
            return Found(rows, np.empty(0, "U1"), rows, np.empty(0), {"num_unread": num_unread})
        uids = manifest.uids(rows)
        clusters = kmeans.spherical(embedded.features[places], uids, num_clusters=self.num_clusters, num_probed=1)
        labels, sizes = (
            clusters.nearest[:, 0],
            np.bincount(clusters.nearest[:, 0], minlength=len(clusters.centroids_KD)),
        )
        kept = quotas(complexities(clusters), sizes, num_of_share(self.keep, len(rows)), self.temperature)
        order = kmeans.uid_order(uids, labels, clusters.cosine)  # the farthest of each cluster first
        number = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        dropped = order[number >= kept[labels[order]]]
        facts = {
            "num_unread": num_unread,
            "num_clusters": int((sizes > 0).sum()),
            "num_clusters_whole": int((kept == sizes)[sizes > 0].sum()),
        }
        values = 1 - clusters.cosine[dropped]
        return Found(rows[dropped], np.full(len(dropped), DENSITY), np.full(len(dropped), -1), values, facts)


def complexities(clusters: kmeans.Clusters) -> NDArray[np.float64]:
    """float64 [K]: d_intra * d_inter of each cluster, 0 of an empty one; the same for any order of the rows.

    Sums are of multiples of 2^-36 as integers, exact up to 2^25 rows a cluster. Of a single cluster d_inter is 1.
    """
    labels, centroids_KD = clusters.nearest[:, 0], clusters.centroids_KD
    sizes = np.bincount(labels, minlength=len(centroids_KD))
    sums = np.zeros(len(sizes), np.int64)
    np.add.at(sums, labels, np.rint((1 - clusters.cosine) * _GRID).astype(np.int64))
    filled = np.flatnonzero(sizes)
    d_intra, d_inter = sums[filled] / _GRID / sizes[filled], np.ones(len(filled))
    num = min(NUM_NEIGHBOURS, len(filled) - 1)
    for place, number in enumerate(filled.tolist()):
        distances = 1 - centroids_KD[filled] @ centroids_KD[number]
        distances[place] = np.inf
        d_inter[place] = np.sort(np.partition(distances, num)[:num] if num else [1.0]).mean()
    found = np.zeros(len(sizes))
    found[filled] = d_intra * d_inter
    return found


def quotas(
    complexity: NDArray[np.float64], sizes: NDArray[np.int64], num: int, temperature: float
) -> NDArray[np.int64]:
    """int64 [K]: how many rows of each cluster stay, `num` in all.

    Args:
        complexity: [K].
        sizes: [K], rows of each cluster; of one without rows none stays.
        num: up to the sum of the sizes.
        temperature: of the softmax.
    """
    kept, filled = np.zeros(len(sizes), np.int64), np.flatnonzero(sizes)
    scaled = complexity[filled] / temperature
    shares = np.exp(scaled - scaled.max())
    least = np.full(len(filled), 1 if num >= len(filled) else 0)
    exact = _nearest_within(num * (shares / math.fsum(shares)), least, sizes[filled], num)
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")  # the largest remainder first, of equal ones the lower number
    order = order[whole[order] < sizes[filled[order]]][: num - int(whole.sum())]
    whole[order] += 1
    kept[filled] = whole
    return kept


def _nearest_within(
    wanted: NDArray[np.float64], least: NDArray[np.int64], most: NDArray[np.int64], total: int
) -> NDArray[np.float64]:
    """The x [K] of sum `total`, between `least` and `most`, with the least squared distance from `wanted`: it is
    wanted + shift, cut at the limits, and its sum is linear in the shift between the shifts at which a cut begins."""
    shifts = np.unique(np.concatenate([least - wanted, most - wanted]))
    low, high = 0, len(shifts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(wanted + shifts[middle], least, most).sum() <= total:
            low = middle
        else:
            high = middle
    below, above = (np.clip(wanted + shifts[place], least, most) for place in (low, high))
    rise = above.sum() - below.sum()
    return below + (above - below) * ((total - below.sum()) / rise if rise > 0 else 0)
