"""Several objectives at once: the weighted sum of their means over the global batch, in one pass of the model.

A mean is over what an objective counts, pairs for a contrast and tokens for a caption, so the parts have counts of
their own. The engine divides by one count, that of the pairs; each part's sum is therefore brought to that count, with
both counts taken over all ranks. The gradient is that of `sum over parts of weight x mean`, however the batch was cut.

A separable part rides along as a feature: its sum over a micro-batch is spread over the rows of the micro-batch, so
that the engine's two passes send its gradient back like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError
from vlm_train.objectives.base import CoupledObjective, Objective, SeparableObjective, counted_rows
from vlm_train.types import Batch, LossOutput, Model, Outputs

SUM, COUNT = "sum", "count"


class WeightedSum(CoupledObjective):
    """The sum of the means of several objectives, each times its weight.

    Args:
        parts: name -> objective.
        weights: name -> factor of its mean; as many as parts, none below 0.
    """

    def __init__(self, *, parts: Mapping[str, Objective], weights: Mapping[str, float]) -> None:
        super().__init__()
        if set(parts) != set(weights) or not parts or min(weights.values()) < 0:
            raise ConfigError(
                "the weights of a weighted sum do not fit its parts",
                got=f"parts {', '.join(parts) or 'none'}; weights {dict(weights)}",
                allowed="a weight of at least 0 for each part",
                remedy="objective.weights.NAME=1.0",
            )
        self.parts = nn.ModuleDict(parts)
        self.weights = {name: float(weights[name]) for name in parts}
        self.requires = frozenset().union(*(part.requires for part in parts.values()))
        self.reads = frozenset().union(*(part.reads for part in parts.values()))

    def count(self, batch: Batch) -> Tensor:
        """Number of pairs that count."""
        return counted_rows(batch).sum()

    def features(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Every part's features as `NAME/KEY`; of a separable part its sums and counts. One pass of the model serves
        all parts that ask for the batch as it is."""
        once: Any = _Once(model)
        rows: dict[str, Tensor] = {"weights": counted_rows(batch).to(torch.float32)}
        for name, part in self.parts.items():
            if isinstance(part, SeparableObjective):
                found = _spread(part(once, batch), len(rows["weights"]))
            else:
                assert isinstance(part, CoupledObjective)
                found = part.features(once, batch)
            rows.update({f"{name}/{key}": value for key, value in found.items()})
        return rows

    def loss(self, features: dict[str, Tensor]) -> LossOutput:
        """The weighted sum over this rank's pairs. Metrics: those of the parts as `NAME/METRIC`, and `NAME/loss`."""
        num_pairs = (features["weights"] != 0).sum()
        everywhere = collectives.all_reduce_sum(num_pairs).double()
        total: Tensor | float = 0.0
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        for name, part in self.parts.items():
            mine = {key.partition("/")[2]: value for key, value in features.items() if key.startswith(f"{name}/")}
            output = part.loss(mine) if isinstance(part, CoupledObjective) else _gathered_up(mine)
            share = everywhere / collectives.all_reduce_sum(output.count).double().clamp(min=1)
            total = total + self.weights[name] * output.sum * share.to(output.sum.dtype)
            metrics[f"{name}/loss"] = output.sum.detach(), output.count.detach()
            metrics.update({f"{name}/{key}": value for key, value in output.metrics.items()})
        assert isinstance(total, Tensor)
        return LossOutput(sum=total, count=num_pairs, metrics=metrics)

    def after_step(self) -> None:
        """What the parts do."""
        for part in self.parts.values():
            assert isinstance(part, Objective)
            part.after_step()


class _Once:
    """A model that runs once for the same batch."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.seen: list[tuple[Batch, Outputs]] = []

    def __call__(self, batch: Batch) -> Outputs:
        for known, outputs in self.seen:
            if known is batch:
                return outputs
        outputs = self.model(batch)
        self.seen.append((batch, outputs))
        return outputs


def _spread(output: LossOutput, num_rows: int) -> dict[str, Tensor]:
    """Sum, count and metrics of a micro-batch as rows that add up to them."""
    values = {SUM: output.sum, COUNT: output.count.double()}
    for name, pair in output.metrics.items():
        values.update({f"{name}/{part}": value.double() for part, value in zip((SUM, COUNT), pair, strict=True)})
    return {key: (value / max(num_rows, 1)).expand(num_rows) for key, value in values.items()}


def _gathered_up(rows: dict[str, Tensor]) -> LossOutput:
    """The output whose parts `_spread` laid out."""
    sums = {key: value.sum() for key, value in rows.items()}
    names = [key.removesuffix(f"/{SUM}") for key in rows if key.endswith(f"/{SUM}")]
    metrics = {name: (sums[f"{name}/{SUM}"], sums[f"{name}/{COUNT}"]) for name in names}
    return LossOutput(sum=sums[SUM], count=sums[COUNT].round(), metrics=metrics)
