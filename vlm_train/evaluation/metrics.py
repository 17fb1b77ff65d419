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

_GRID_BITS = 26
_TILE_SCORES = 1 << 22  # scores held at once: 32 MiB


def exact(rows: Tensor) -> Tensor:
    """Unit rows [N, D] in fp64 on the grid on which dot products are exact."""
    return in_steps(rows, _GRID_BITS)


def on_grid(features: Tensor, name: str) -> Tensor:
    """`exact`, of rows that are looked at first.

    Raises:
        VlmError: when a row is not finite or not of unit length. A NaN must never be ranked: every comparison with it
            is false, which reads as "nothing ranks above".
    """
    norms, bad = not_unit(features)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise no_unit_rows(name, int(bad.sum()), len(features), first, float(norms[first]))
    return exact(features)


def not_unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of rows, fp64 [N], and which of them are not finite or not of unit length."""
    norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64)
    return norms, ~((norms - 1).abs() <= 1e-3)  # written so that NaN is bad


def no_unit_rows(name: str, num_bad: int, num_rows: int, first: int, norm: float) -> VlmError:
    """The error about rows that cannot be ranked."""
    return VlmError(
        f"{name} cannot be ranked: some rows are not unit vectors",
        got=f"{num_bad} of {num_rows} rows, first is row {first} with norm {norm:g}",
        allowed="finite rows of norm 1",
        remedy="evaluate an earlier checkpoint, or look for a NaN loss in metrics.jsonl",
    )


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
        standing_of(query @ candidates_ND.T, item[:, None] == candidate_item_N)
        for query, item in zip(queries_QD.split(tile), query_item_Q.split(tile), strict=True)
    ]
    return Standing(*(torch.cat(column) for column in zip(*parts, strict=True)))


def standing_of(scores_QN: Tensor, right_QN: Tensor) -> Standing:
    """Where the best right candidate of each query stands, by scores on which equality can be relied."""
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


def knowing_nothing(num_right_Q: Tensor, num_candidates: int) -> Standing:
    """Where right candidates stand for a scorer that knows nothing: all are tied. What that earns is chance."""
    return Standing(torch.zeros_like(num_right_Q), num_candidates - num_right_Q, num_right_Q)


def in_steps(values: Tensor, bits: int) -> Tensor:
    """fp64 values rounded to multiples of 2^-bits: sums of them below 2^(53 - bits) are exact, so they have no order,
    and values that differ by less than a rounding error are equal."""
    return (values.to(torch.float64) * 2.0**bits).round() / 2.0**bits


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
