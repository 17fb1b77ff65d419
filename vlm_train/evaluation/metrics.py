"""Exact ranking with honest ties, and the statistics printed beside a score.

Ties. A scorer that gives every candidate the same score knows nothing, yet an `argmax` or a stable sort rates it by
where the right answer happens to stand: 0 % or 100 %. Here a query earns the *expected* credit under a uniformly random
order of equal scores, so such a scorer lands on chance.

Exactness. Whether two scores are equal, and which is larger, must not depend on the tile, the BLAS library or the
number of ranks that computed them, but floating-point sums do depend on their order. So unit vectors are rounded to
multiples of 2^-26 and multiplied in fp64: every product is a multiple of 2^-52 and every partial sum is at most 1
(Cauchy-Schwarz), so each fits the 53 bits of fp64 and no rounding ever happens, in any order. What the inputs lose
(2^-27 per entry) is below the rounding of the fp32 forward that made them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_train.errors import VlmError

_GRID = 2.0**26
_TILE_SCORES = 1 << 22  # scores held at once: 32 MiB


def on_grid(features: Tensor, name: str) -> Tensor:
    """Unit-length rows [N, D] in fp64 on the grid on which dot products are exact.

    Raises:
        VlmError: when a row is not finite or not of unit length. A NaN must never be ranked: every comparison with it
            is false, which reads as "nothing ranks above".
    """
    rows = features.to(torch.float64)
    norms = rows.norm(dim=1)
    bad = ~((norms - 1).abs() <= 1e-3)  # written so that NaN is bad
    if bad.any():
        first = int(bad.nonzero()[0])
        raise VlmError(
            f"{name} cannot be ranked: some rows are not unit vectors",
            got=f"{int(bad.sum())} of {len(rows)} rows, first is row {first} with norm {float(norms[first]):g}",
            allowed="finite rows of norm 1",
            remedy="evaluate an earlier checkpoint, or look for a NaN loss in metrics.jsonl",
        )
    return (rows * _GRID).round() / _GRID


class Standing(NamedTuple):
    """Where the best right candidate of each query stands; int64 [Q] each."""

    num_above: Tensor  # wrong candidates with a higher score
    num_tied: Tensor  # wrong candidates with the same score
    num_right: Tensor  # right candidates with that score


def standings(queries_QD: Tensor, candidates_ND: Tensor, query_item_Q: Tensor, candidate_item_N: Tensor) -> Standing:
    """Ranks all candidates for each query, in tiles. A candidate is right when its item is the query's item.

    `queries_QD` and `candidates_ND` come from `on_grid`. A query without a right candidate is given `num_right` 0.
    """
    tile = max(1, _TILE_SCORES // max(1, len(candidates_ND)))
    parts = [
        _tile_standings(query @ candidates_ND.T, item[:, None] == candidate_item_N)
        for query, item in zip(queries_QD.split(tile), query_item_Q.split(tile), strict=True)
    ]
    return Standing(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _tile_standings(scores_QN: Tensor, right_QN: Tensor) -> Standing:
    best_Q1 = scores_QN.masked_fill(~right_QN, -math.inf).amax(1, keepdim=True)
    equal_QN = scores_QN == best_Q1
    return Standing(
        num_above=(scores_QN > best_Q1).sum(1),
        num_tied=(equal_QN & ~right_QN).sum(1),
        num_right=(equal_QN & right_QN).sum(1),
    )


def credit_at_k(standing: Standing, k: int) -> Tensor:
    """Probability that a right candidate is among the first k when equal scores are shuffled: fp64 [Q].

    With m places left after those above, t wrong and r right candidates tied, it is 1 - C(t, m) / C(t + r, m); for one
    right candidate, m / (t + 1).
    """
    places = (k - standing.num_above).clamp(min=0)
    missed = torch.ones_like(places, dtype=torch.float64)
    for drawn in range(k):
        wrong_left = (standing.num_tied - drawn).clamp(min=0).to(torch.float64)
        all_left = (standing.num_tied + standing.num_right - drawn).clamp(min=1)
        missed = torch.where(drawn < places, missed * wrong_left / all_left, missed)
    return torch.where(standing.num_right > 0, 1.0 - missed, 0.0)


def chance_at_k(num_right_Q: Tensor, num_candidates: int, k: int) -> Tensor:
    """What a scorer that knows nothing earns: all candidates tied. fp64 [Q]."""
    nothing_above = torch.zeros_like(num_right_Q)
    return credit_at_k(Standing(nothing_above, num_candidates - num_right_Q, num_right_Q), k)


def wilson_interval(successes: float, num_trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a proportion, in 0..1 (Wilson 1927). Honest at 0, at 1 and for few trials."""
    if num_trials == 0:
        return 0.0, 1.0
    proportion = successes / num_trials
    centre = proportion + z * z / (2 * num_trials)
    spread = z * math.sqrt(proportion * (1 - proportion) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def macro_mean(values_N: Tensor, label_N: Tensor) -> float:
    """Mean over the classes that occur of the mean within the class: rare classes weigh as much as frequent ones."""
    num_classes = int(label_N.max()) + 1
    counts = torch.bincount(label_N, minlength=num_classes)
    sums = torch.bincount(label_N, weights=values_N.to(torch.float64), minlength=num_classes)
    return float((sums[counts > 0] / counts[counts > 0]).mean())
