"""Classification by the training images that lie nearest: by their votes, and by the means of a few of each class.

Votes of the k nearest count alike, or as exp(cosine / temperature) (Wu et al., arXiv 1805.01978; DINO, arXiv
2104.14294). Images that are as near as the k-th share the places that are left, and votes are added in exact steps, so
nothing depends on the order of the training images. Class means are prototypical networks' (arXiv 1703.05175), by
cosine: nothing to fit and nothing to tune, which is what one image a class allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.evaluation.metrics import in_steps

_TILE_SCORES = 1 << 22
_VOTE_BITS = 38  # votes add up to k at most: exact for k below 2^15


def votes(
    queries_QD: Tensor,
    gallery_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, Tensor]:
    """Name of a vote -> what each query gives each class, fp64 [Q, C]. Rows come from `metrics.exact`."""
    tile = max(1, _TILE_SCORES // max(1, len(gallery_ND)))
    parts: dict[str, list[Tensor]] = {}
    for rows in queries_QD.split(tile):
        scores_QN = rows @ gallery_ND.T
        weights_QN = ((scores_QN - scores_QN.amax(1, keepdim=True)) / temperature).exp()
        for k, near_QN in _nearest(scores_QN, ks):
            for name, given in ((f"k={k} weighted", near_QN * weights_QN), (f"k={k} plain", near_QN)):
                total = given.new_zeros(len(rows), num_classes)
                total.scatter_add_(1, labels_N.expand_as(given), in_steps(given, _VOTE_BITS))
                parts.setdefault(name, []).append(total)
    return {name: torch.cat(found) for name, found in parts.items()}


def _nearest(scores_QN: Tensor, ks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(k, which images are among the k nearest: 1, 0, or the share of a place)."""
    num = scores_QN.shape[1]
    best = scores_QN.topk(min(max(ks), num), dim=1).values
    for k in ks:
        last = best[:, min(k, num) - 1, None]
        nearer, as_near = scores_QN > last, scores_QN == last
        left = (min(k, num) - nearer.sum(1, keepdim=True)).to(scores_QN.dtype)
        yield k, nearer + as_near * (left / as_near.sum(1, keepdim=True))


def class_means(features_ND: Tensor, labels_N: Tensor, num_classes: int, *, shots: int, seed: int) -> Tensor:
    """The mean of `shots` images of each class, drawn by `seed` (all of a class that has fewer), unit rows fp64 [C, D].

    Rows come from `metrics.exact`; every class has one at least.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels_N), generator=generator).to(labels_N.device)
    order = shuffled[labels_N[shuffled].sort(stable=True).indices]  # class by class, in the order of the draw
    chosen = order[place_in_class(labels_N[order]) < shots]
    sums = features_ND.new_zeros(num_classes, features_ND.shape[1]).index_add_(0, labels_N[chosen], features_ND[chosen])
    return F.normalize(sums, dim=1)


def place_in_class(labels_N: Tensor) -> Tensor:
    """How many rows of the same class come before each row: int64 [N]."""
    order = labels_N.sort(stable=True).indices
    counts = torch.bincount(labels_N)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(labels_N), device=labels_N.device) - starts[labels_N[order]]
    return torch.empty_like(places).index_copy_(0, order, places)
