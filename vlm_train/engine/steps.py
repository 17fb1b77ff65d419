"""Gradients of one optimizer step: K micro-batches on this rank, the same result as one big batch.

A separable objective is a sum over samples, so micro-batches just add up. A coupled one (contrastive) needs every
pair of the global batch; with K > 1 the cached two-pass scheme (GradCache, Gao et al. 2021) runs:

1. forward every micro-batch without graph and keep the features only;
2. evaluate the loss on the features of the whole step, and take its gradient with respect to the features and to the
   objective's own parameters (temperature, bias), once;
3. forward every micro-batch again with its randomness replayed, and push the feature gradients through it by a
   surrogate whose gradient they are. The objective's parameters join the last surrogate, so that each of them is
   reduced over ranks exactly once.

Randomness is keyed, never carried: before each forward the generators are seeded from (seed, step, position of the
micro-batch in the global batch). A replay is therefore exact, a resumed run needs no generator state, and ranks and
micro-batches that cut the batch at the same places draw the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.engine.micro_batches import Budgets, Rows, pack_dialogues, take_rows
from vlm_train.objectives.base import CoupledObjective, Objective, SeparableObjective
from vlm_train.types import Batch, LossOutput, Model, rank_share

Backward = Callable[[Tensor, bool], None]
"""(scalar, is_last): backward through the strategy; only the last call of a step reduces gradients over ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How this rank cuts its share of the global batch. `budgets`: what it runs forward at once."""

    global_batch: int
    budgets: Budgets
    rank: int
    world_size: int
    seed: int

    @property
    def num_micro_batches(self) -> int:
        """K of samples that are equal, the same on every rank: the largest share decides."""
        largest = -(-self.global_batch // self.world_size)
        return 1 if self.budgets.samples is None else -(-largest // self.budgets.samples)

    def cut(self, batch: Batch) -> list[Rows]:
        """The rows of each micro-batch within this rank's batch, as many on every rank. In order; dialogues by what
        they take, where that has a budget, for then they may be summed in any order."""
        if self.budgets.weighs_dialogues:
            return pack_dialogues(batch, self.budgets)
        start, stop = rank_share(self.global_batch, self.rank, self.world_size)
        bounds = [rank_share(stop - start, index, self.num_micro_batches) for index in range(self.num_micro_batches)]
        return [range(*each) for each in bounds]

    def seed_for(self, step: int, micro_start: int) -> int:
        """63-bit seed of the micro-batch that starts at row `micro_start` of this rank's batch."""
        position = rank_share(self.global_batch, self.rank, self.world_size)[0] + micro_start
        digest = hashlib.blake2b(f"{self.seed}/{step}/{position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


class GradientStep:
    """Accumulates the exact gradient of one step into `.grad` and returns the global mean loss and metrics."""

    def __init__(self, *, model: Model, objective: Objective, plan: StepPlan) -> None:
        self.model, self.objective, self.plan = model, objective, plan

    def run(self, batch: Batch, step: int, backward: Backward) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss over the global batch, mean metrics); scalars, equal on every rank."""
        micro_batches = [(min(rows, default=0), take_rows(batch, rows)) for rows in self.plan.cut(batch)]
        count = collectives.all_reduce_sum(self.objective.count(batch).detach().clone())
        # DistributedDataParallel averages over ranks; the sum over ranks is what the mean over the global batch needs
        scale = self.plan.world_size / count.double().clamp(min=1)
        if isinstance(self.objective, SeparableObjective):
            outputs = list(self._separable(self.objective, micro_batches, step, scale, backward))
        else:
            assert isinstance(self.objective, CoupledObjective)
            outputs = [self._coupled(self.objective, micro_batches, step, scale, backward)]
        return _global_means(outputs, count)

    def _separable(
        self,
        objective: SeparableObjective,
        micro_batches: list[tuple[int, Batch]],
        step: int,
        scale: Tensor,
        backward: Backward,
    ) -> Iterator[LossOutput]:
        for index, (start, micro_batch) in enumerate(micro_batches):
            self._reseed(step, start)
            output = objective(self.model, micro_batch)
            backward(output.sum * scale, index == len(micro_batches) - 1)
            yield output

    def _coupled(
        self,
        objective: CoupledObjective,
        micro_batches: list[tuple[int, Batch]],
        step: int,
        scale: Tensor,
        backward: Backward,
    ) -> LossOutput:
        if len(micro_batches) == 1:
            output = objective.loss(self._features(objective, micro_batches[0], step))
            backward(output.sum * scale, True)
            return output
        with torch.no_grad():
            cached = [self._features(objective, item, step) for item in micro_batches]
        features = {key: torch.cat([part[key] for part in cached]) for key in cached[0]}
        for value in features.values():
            value.requires_grad_(value.is_floating_point())
        parameters: list[Tensor] = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        inputs = [value for value in features.values() if value.requires_grad]
        output = objective.loss(features)
        gradients = torch.autograd.grad(output.sum * scale, inputs + parameters, allow_unused=True)
        gradient_of = dict(zip([id(value) for value in inputs], gradients, strict=False))
        own = sum((p * g).sum() for p, g in zip(parameters, gradients[len(inputs) :], strict=True) if g is not None)
        for index, (start, micro_batch) in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            replayed = self._features(objective, (start, micro_batch), step)
            rows = slice(start, start + _num_rows(micro_batch))
            surrogate = sum(
                (value.to(gradient.dtype) * gradient[rows]).sum()
                for key, value in replayed.items()
                if (gradient := gradient_of.get(id(features[key]))) is not None and value.requires_grad
            )
            backward(surrogate + own if is_last else surrogate, is_last)  # type: ignore[arg-type]
        return output

    def _features(self, objective: CoupledObjective, item: tuple[int, Batch], step: int) -> dict[str, Tensor]:
        start, micro_batch = item
        self._reseed(step, start)
        return objective.features(self.model, micro_batch)

    def _reseed(self, step: int, micro_start: int) -> None:
        torch.manual_seed(self.plan.seed_for(step, micro_start))


def _num_rows(batch: Batch) -> int:
    return len(batch["weights"])


def _global_means(outputs: list[LossOutput], count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One collective for everything: sums of losses and metrics, and the counts of the metrics."""
    names = list(outputs[0].metrics)
    sums = [torch.stack([o.sum.detach().double() for o in outputs]).sum()]
    for name in names:
        sums += [torch.stack([o.metrics[name][part].detach().double() for o in outputs]).sum() for part in (0, 1)]
    total = collectives.all_reduce_sum(torch.stack(sums))
    means = {name: total[1 + 2 * i] / total[2 + 2 * i].clamp(min=1) for i, name in enumerate(names)}
    return total[0] / count.double().clamp(min=1), means
