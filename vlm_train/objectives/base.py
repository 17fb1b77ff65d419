"""What every objective is: a sum and a count, so that the result does not depend on how a batch was cut.

The mean of means is not the mean when parts are unequal. So an objective returns the *sum* over its terms and the
*count* of its terms, and the engine divides by the count of the whole global batch, which it knows before the first
backward. With W ranks whose gradients are averaged (DDP, FSDP2), the engine minimises `sum * W / global count`.

Two kinds:
- *separable* (captioning, boxes): the sum over samples; micro-batches are independent.
- *coupled* (contrastive): every sample meets every other of the global batch. `features` is run per micro-batch,
  `loss` once per step on the features of all micro-batches; the engine sends the features' gradient back through a
  second, replayed forward. Other ranks' features come through `collectives.gather_rows` inside `loss`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError, nearest
from vlm_train.types import Batch, LossOutput, Model


class Objective(nn.Module, ABC):
    """Base of what trains.

    `requires`: the keys of `Model.outputs` that the objective reads. `reads`: fields of the batch that it reads beside
    those that every batch has.
    """

    requires: frozenset[str]
    reads: frozenset[str] = frozenset()

    @abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """Number of loss terms of this rank's batch, int64 scalar, known before any forward.

        Rows of weight 0 do not count. Equals the `LossOutput.count` of the same rows.
        """

    def after_step(self) -> None:
        """Called after each optimizer step: the place to clamp the objective's own parameters."""


class SeparableObjective(Objective):
    """An objective whose sum splits over samples."""

    @abstractmethod
    def forward(self, model: Model, batch: Batch) -> LossOutput:
        """Sum and count over one micro-batch."""


class CoupledObjective(Objective):
    """An objective in which every sample of the global batch meets every other."""

    @abstractmethod
    def features(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """What `loss` needs of one micro-batch: tensors whose rows are the rows of the batch.

        Entries that require no gradient (weights, labels) ride along.
        """

    @abstractmethod
    def loss(self, features: dict[str, Tensor]) -> LossOutput:
        """Sum over this rank's share of the terms; the sums of all ranks add up to the global sum.

        Collective. `features`: the dictionaries of the step's micro-batches, concatenated by key along the rows.
        """


def check_outputs(objective: Objective, model_outputs: Iterable[str]) -> None:
    """Refuses a model that does not return what the objective reads, before anything is built on a device.

    Raises:
        ConfigError: naming the missing keys and what the model has.
    """
    available = sorted(model_outputs)
    missing = sorted(objective.requires - set(available))
    if not missing:
        return
    close = {key: nearest(key, available, num=1) for key in missing}
    hints = [f"{key} (the model has {match[0]})" if match else key for key, match in close.items()]
    raise ConfigError(
        f"Objective {type(objective).__name__} needs outputs that the model does not return",
        got=", ".join(available) or "no outputs",
        allowed=", ".join(sorted(objective.requires)),
        remedy=f"choose another model or objective; missing: {', '.join(hints)}",
    )


def counted_rows(batch: Batch) -> Tensor:
    """Which rows of the batch count: bool [B]. Padding rows carry weight 0; a batch without weights has none."""
    weights = batch.get("weights")
    if weights is not None:
        return weights != 0
    rows = batch["images"] if "images" in batch else batch["text_ids"]
    return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
