"""What a coupled objective takes while every sample of the global batch meets every other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_train.objectives.base import CoupledObjective
from vlm_train.objectives.contrastive import GATHERED_SHARE
from vlm_train.objectives.pairing import COPIES
from vlm_train.objectives.tiled import LARGE_TILE
from vlm_train.plan.shapes import Live, Shapes

_ROWS = (2048, 4096, 8192)
"""Of how many rows the loss is run, to see how its memory grows: so many that logits are most of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureKind:
    """One entry of a coupled objective's features: what a row is, and whether gradients are sent through it."""

    row: tuple[int, ...]
    dtype: torch.dtype
    learns: bool

    @classmethod
    def of(cls, value: Tensor) -> FeatureKind:
        """Of rows such as `value` has."""
        return cls(row=tuple(value.shape[1:]), dtype=value.dtype, learns=value.requires_grad)

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return torch.empty(self.row, dtype=self.dtype, device="meta").nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMemory:
    """Bytes at the peak of a loss: for each logit, for each row of a rank, and for each row that others send."""

    logit: float
    row: float
    gathered_row: float
    implementation: str

    def bytes(self, rows: int, everywhere: int, device_memory: float) -> float:
        """Of a rank with `rows` of the `everywhere` rows of all ranks. `device_memory`: bytes, which decide whether
        logits exist at once (`contrastive.Contrastive`)."""
        logits = self.logit * rows * everywhere
        is_tiled = self.implementation == "tiled"
        if self.implementation == "auto":
            is_tiled = logits > GATHERED_SHARE * device_memory
        if is_tiled:
            return COPIES * 4.0 * LARGE_TILE + 2 * self.row * rows
        return logits + self.row * rows + self.gathered_row * (everywhere - rows)


NO_LOSS = LossMemory(logit=0, row=0, gathered_row=0, implementation="gathered")


def loss_memory(
    objective: CoupledObjective, kinds: Mapping[str, FeatureKind], shapes: Shapes, implementation: str
) -> LossMemory:
    """From three runs of the loss on shapes: its memory is a parabola of the number of rows."""
    low, middle, high = (_peak(objective, kinds, shapes, num_rows) for num_rows in _ROWS)
    first, second = _ROWS[1] - _ROWS[0], _ROWS[2] - _ROWS[1]
    slopes = (middle - low) / first, (high - middle) / second
    logit = max((slopes[1] - slopes[0]) / (_ROWS[2] - _ROWS[0]), 0.0)
    row = max(slopes[1] - logit * (_ROWS[2] + _ROWS[1]), 0.0)
    gathered = 2.0 * sum(kind.row_bytes for kind in kinds.values() if kind.learns)  # the rows, and their gradients
    return LossMemory(logit=logit, row=row, gathered_row=gathered, implementation=implementation)


def _peak(objective: CoupledObjective, kinds: Mapping[str, FeatureKind], shapes: Shapes, num_rows: int) -> int:
    features = {name: _rows(kind, num_rows) for name, kind in kinds.items() if not kind.learns}
    learning = {name: ((num_rows, *kind.row), kind.dtype) for name, kind in kinds.items() if kind.learns}
    inputs = shapes.of_bytes(learning)
    with shapes.running(), Live(objective.parameters()) as live:
        for value in inputs.values():
            value.requires_grad_()
        output = objective.loss({**features, **inputs})
        own = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        torch.autograd.grad(output.sum, [*inputs.values(), *own], allow_unused=True)
    return live.peak


def _rows(kind: FeatureKind, num_rows: int) -> Any:
    """Weights of 1, truths, and whole numbers that all differ."""
    if kind.dtype == torch.int64:
        size = max(1, torch.Size(kind.row).numel())
        return torch.arange(num_rows * size).view(num_rows, *kind.row)
    return torch.ones(num_rows, *kind.row, dtype=kind.dtype)
