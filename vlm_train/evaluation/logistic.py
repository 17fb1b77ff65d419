"""L2-regularised logistic regression, to the optimum, in fp64; and how strongly to regularise it.

Softmax over the classes, weights [C, D] and a bias for each class; what is minimised is the mean cross-entropy plus
l2 / 2 times the squared norm of the weights (the bias is free). It is convex, so the answer belongs to the data and not
to the start. The strength is swept as for CLIP's linear probes (arXiv 2103.00020, A.3): seven values from 1e-6 to 1e6
first, then around the best in ever smaller steps, down to eight a decade, judged on features held out from training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.evaluation.metrics import in_steps

_STEPS_PER_DECADE = 8
_DECADES_APART = 2
_LARGEST = 6 * _STEPS_PER_DECADE  # of the exponents, in eighths of a decade
_MAX_ITERATIONS = 1000
_TOLERANCE = 1e-7  # of the gradient
_SCORE_BITS = 30


class Linear(NamedTuple):
    """A classifier. `weights` fp64 [C, D], `bias` fp64 [C]."""

    weights: Tensor
    bias: Tensor

    def scores(self, features_ND: Tensor) -> Tensor:
        """fp64 [N, C], in steps of 1e-9: what is closer is equal as far as the optimiser can tell."""
        return in_steps(features_ND.to(torch.float64) @ self.weights.T + self.bias, _SCORE_BITS)


def fit(features_ND: Tensor, labels_N: Tensor, num_classes: int, l2: float) -> Linear:
    """The classifier at the optimum. Labels are 0..num_classes - 1."""
    rows = features_ND.to(torch.float64)
    weights = rows.new_zeros(num_classes, rows.shape[1], requires_grad=True)
    bias = rows.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=torch.finfo(torch.float64).eps,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(rows @ weights.T + bias, labels_N) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Linear(weights.detach(), bias.detach())


def best_l2(features_ND: Tensor, labels_N: Tensor, held_out_N: Tensor, num_classes: int) -> float:
    """The strength that is most often right on the rows `held_out_N` after learning from the others; of equal ones the
    largest. The ranks share the work: every rank brings all features. Collective."""
    learn = features_ND[~held_out_N], labels_N[~held_out_N]
    judge = features_ND[held_out_N], labels_N[held_out_N]
    right: dict[int, int] = {}
    step = _DECADES_APART * _STEPS_PER_DECADE
    wanted = list(range(-_LARGEST, _LARGEST + 1, step))
    while True:
        mine = {}
        for exponent in wanted[collectives.rank() :: collectives.world_size()]:
            classifier = fit(*learn, num_classes, _strength(exponent))
            mine[str(exponent)] = int((classifier.scores(judge[0]).argmax(1) == judge[1]).sum())
        for part in collectives.gather_objects(mine):
            right |= {int(exponent): count for exponent, count in part.items()}
        best = max(right, key=lambda exponent: (right[exponent], exponent))
        if step == 1:
            return _strength(best)
        step //= 2
        wanted = [exponent for exponent in (best - step, best + step) if abs(exponent) <= _LARGEST]


def _strength(exponent: int) -> float:
    return 10.0 ** (exponent / _STEPS_PER_DECADE)
