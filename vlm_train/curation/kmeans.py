"""Spherical k-means of embeddings, with the same bits on every machine and in every order of the rows.

Rows are rounded to multiples of 2^-26, before and after they are brought to length 1, which moves a row by at most
sqrt(D) * 2^-26 (3.4e-7 at 512 numbers). The product of two such numbers is a multiple of 2^-52, and no partial sum of a
dot product of unit rows is above 1, so float64 holds every one of them exactly: a matrix product does not round,
whatever the order in which a library adds. Sums of rows are multiples of 2^-26 and exact up to 2^27 rows. What is left
are single divisions and square roots, which IEEE 754 fixes. So neither threads nor blocks nor the device can change a
bit; and as the seeds are drawn by uid, the order of the rows cannot either. The price is float64: about half the speed
of float32 on a processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_train.curation.clusters import uid_words
from vlm_train.data.order import derive, mix
from vlm_train.errors import ConfigError, DataError

Embeddings = NDArray[np.float16] | NDArray[np.float32]
Uids = NDArray[np.uint8]

BLOCK = 1024
"""Rows, and centroids, that are in one matrix product: 8 MB of cosines."""

_GRID = 2.0**26
_NORM_TOLERANCE = (
    1e-2  # float16 moves the norm of a unit row by 5e-4; what is farther off was never brought to length 1
)
_FEWEST_ROWS = 39  # per cluster: with fewer, centroids follow single rows; faiss warns below the same number


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Where rows lie. Some clusters may be empty where there are fewer different rows than clusters.

    Args:
        centroids_KD: float64 unit rows.
        nearest: int32 [N, P], the numbers of the P centroids nearest to each row, nearest first; of equally near ones
            the lower number first. A row's cluster is `nearest[:, 0]`.
        cosine: float64 [N], of each row with the centroid of its cluster.
        num_iterations: how often centroids moved.
    """

    centroids_KD: NDArray[np.float64]
    nearest: NDArray[np.int32]
    cosine: NDArray[np.float64]
    num_iterations: int


def default_num_clusters(num_rows: int) -> int:
    """The square root of the number of rows, at most one for each 39 rows, at least one."""
    return max(1, min(round(math.sqrt(num_rows)), num_rows // _FEWEST_ROWS))


def spherical(
    embeddings: Embeddings,
    uids: Uids,
    *,
    num_clusters: int | None = None,
    num_probed: int = 3,
    seed: int = 0,
    num_iterations: int = 20,
    device: str = "cpu",
) -> Clusters:
    """Clusters of unit rows by cosine (Dhillon and Modha, "Concept decompositions", Machine Learning 2001).

    The same arguments give the same bits with any number of threads, on any device whose float64 obeys IEEE 754, and
    in any process. Rows in another order give the same clusters with the same numbers, as long as no two rows share a
    uid and no cluster has more than 2^27 rows. Memory: a block of rows, the centroids twice, and 8 (P + 2) bytes a row.

    The first centroids are the rows whose hash of (seed, uid) is lowest. A centroid that no row is nearest to is moved
    to the row that is farthest from the centroid of the largest cluster, the next such one to that of the second
    largest. It ends early where nothing moves any more.

    Args:
        embeddings: float16 or float32 [N, D], unit rows, in memory or memory-mapped; they are read in blocks.
        uids: uint8 [N, 16], as of `Manifest.uids`.
        num_clusters: None for `default_num_clusters`.
        num_probed: P, how many centroids are told of each row; at most all.
        num_iterations: how often centroids move at most.
        device: what torch calls the device of the products.

    Raises:
        ConfigError: no rows, a number of clusters that they do not allow, or uids of another number.
        DataError: a row that is not finite or not of length 1.
    """
    num_clusters = default_num_clusters(len(embeddings)) if num_clusters is None else num_clusters
    _check(embeddings, uids, num_clusters, num_probed, num_iterations)
    first = np.lexsort((*uid_words(uids), _drawn(uids, seed)))[:num_clusters]
    centroids_KD, moves = unit_rows(embeddings, first, device), 0
    while moves < num_iterations:
        clusters, sums_KD = _assigned(embeddings, centroids_KD, 1)
        moved_KD = _moved(embeddings, uids, clusters, sums_KD, centroids_KD)
        if torch.equal(moved_KD, centroids_KD):
            break
        centroids_KD, moves = moved_KD, moves + 1
    nearest, cosine = _assigned(embeddings, centroids_KD, min(num_probed, num_clusters))[0]
    return Clusters(
        centroids_KD=centroids_KD.cpu().numpy(), nearest=nearest, cosine=cosine, num_iterations=moves,
    )  # fmt: skip


def uid_order(uids: Uids, *keys: NDArray[np.float64] | NDArray[np.int32]) -> NDArray[np.int64]:
    """Rows by the first of `keys`, then the next, ascending; of equal rows the lower uid, then the lower row."""
    return np.lexsort((*uid_words(uids), *reversed(keys)))


def unit_rows(embeddings: Embeddings, rows: NDArray[np.int64] | slice, device: str) -> Tensor:
    """Some rows as float64 [n, D] of length 1 on the grid on which dot products are exact.

    They are brought to length 1 here, since float16 is off by more than a usual threshold of duplicates.

    Raises:
        DataError: a row that is not finite or not of length 1 to 1 %.
    """
    raw_ND = torch.from_numpy(np.array(embeddings[rows])).to(device)
    unit_ND, norms_N = _to_unit(raw_ND.double())
    bad_N = ~((norms_N - 1).abs() <= _NORM_TOLERANCE)  # written so that NaN is bad
    if bad_N.any():
        first = int(bad_N.nonzero()[0])
        row = int(np.arange(len(embeddings))[rows][first])
        raise DataError(
            "embeddings hold rows that are not unit vectors",
            got=f"row {row} with norm {float(norms_N[first]):g}",
            allowed="finite rows of norm 1, to 1 %",
            remedy="divide each row by its norm before it is written",
        )
    return unit_ND


def _to_unit(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, D] of length up to 1 on the grid, and their norms; a row of zeros stays as it is.

    Rounded before the norm is formed, the sum of squares is exact too.
    """
    rough_ND = _rounded(rows_ND)
    norms_N = rough_ND.square().sum(1).sqrt()
    return _rounded(rough_ND / norms_N.where(norms_N > 0, 1)[:, None]), norms_N


def _rounded(rows_ND: Tensor) -> Tensor:
    return (rows_ND * _GRID).round() / _GRID


def _drawn(uids: Uids, seed: int) -> NDArray[np.uint64]:
    low, high = uid_words(uids)
    return mix(high + derive(seed, low))


def _blocks(num_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, num_rows)) for start in range(0, num_rows, BLOCK))


def _assigned(
    embeddings: Embeddings, centroids_KD: Tensor, num_probed: int
) -> tuple[tuple[NDArray[np.int32], NDArray[np.float64]], Tensor]:
    """(nearest [N, P], cosine with the nearest [N]) and the sums of the rows of each cluster [K, D]."""
    num_rows, sums_KD = len(embeddings), torch.zeros_like(centroids_KD)
    nearest, cosine = np.empty((num_rows, num_probed), np.int32), np.empty(num_rows)
    for block in _blocks(num_rows):
        rows_ND = unit_rows(embeddings, block, str(centroids_KD.device))
        values_NP, numbers_NP = _nearest(rows_ND, centroids_KD, num_probed)
        sums_KD.index_add_(0, numbers_NP[:, 0], rows_ND)
        nearest[block], cosine[block] = numbers_NP.cpu().numpy(), values_NP[:, 0].cpu().numpy()
    return (nearest, cosine), sums_KD


def _nearest(rows_ND: Tensor, centroids_KD: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """(cosines, numbers) of the `num` nearest centroids [n, num], nearest first; some centroids at a time."""
    best_NP = rows_ND.new_empty(len(rows_ND), 0)
    numbers_NP = torch.empty(len(rows_ND), 0, dtype=torch.int64, device=rows_ND.device)
    for block in _blocks(len(centroids_KD)):
        values, places = _largest(rows_ND @ centroids_KD[block].T, num)
        # those of lower numbers stand first, so that the first of equal ones is again that of the lowest number
        values, numbers = torch.cat([best_NP, values], 1), torch.cat([numbers_NP, places + block.start], 1)
        best_NP, chosen = _largest(values, num)
        numbers_NP = numbers.gather(1, chosen)
    return best_NP, numbers_NP


def _largest(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest of each row and their columns, of equal ones the first; `topk` promises no order of ties."""
    values: list[Tensor] = []
    places: list[Tensor] = []
    for number in range(min(num, scores.shape[1])):
        if number:
            scores = scores.scatter(1, places[-1][:, None], -math.inf)
        value, place = scores.max(dim=1)
        values.append(value)
        places.append(place)
    return torch.stack(values, 1), torch.stack(places, 1)


def _moved(
    embeddings: Embeddings,
    uids: Uids,
    assigned: tuple[NDArray[np.int32], NDArray[np.float64]],
    sums_KD: Tensor,
    centroids_KD: Tensor,
) -> Tensor:
    """The directions of the means; a mean of no direction stays where its centroid was, and an empty cluster is put
    into a large one."""
    labels, device = assigned[0][:, 0], str(centroids_KD.device)
    counts = np.bincount(labels, minlength=len(centroids_KD))
    counts_K = torch.from_numpy(counts).to(device).clamp(min=1)
    moved_KD, norms_K = _to_unit(sums_KD / counts_K[:, None])
    moved_KD = moved_KD.where(norms_K[:, None] > 0, centroids_KD)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        givers = (-counts).argsort(kind="stable")[: np.count_nonzero(counts > 1)][: len(empty)]
        order = uid_order(uids, labels, assigned[1])
        farthest = order[(counts.cumsum() - counts)[givers]]
        moved_KD[torch.from_numpy(empty[: len(givers)]).to(device)] = unit_rows(embeddings, farthest, device)
    return moved_KD


def _check(embeddings: Embeddings, uids: Uids, num_clusters: int, num_probed: int, num_iterations: int) -> None:
    if embeddings.ndim != 2 or not len(embeddings):
        raise ConfigError(
            "there is nothing to cluster", got=f"embeddings of shape {embeddings.shape}", allowed="[N, D]"
        )
    if uids.shape != (len(embeddings), 16) or uids.dtype != np.uint8:
        raise ConfigError(
            "embeddings and uids do not belong together",
            got=f"{len(embeddings)} rows, uids {uids.dtype} {list(uids.shape)}",
            allowed=f"uint8 [{len(embeddings)}, 16]",
            remedy="embed the samples of the manifest again",
        )
    if not 1 <= num_clusters <= len(embeddings):
        raise ConfigError("so many clusters cannot be", got=num_clusters, allowed=f"1 to {len(embeddings)}")
    if num_probed < 1 or num_iterations < 0:
        got = f"num_probed {num_probed}, num_iterations {num_iterations}"
        raise ConfigError("k-means cannot run so", got=got, allowed="num_probed from 1, num_iterations from 0")
