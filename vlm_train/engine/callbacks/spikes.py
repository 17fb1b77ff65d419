"""Refuses a step whose loss or gradient is not finite, or whose loss stands far above those before it.

The losses it compares with are rows of metrics.jsonl, so a resumed run judges as an untouched one would. It stands
before every other callback: what it refuses is neither recorded nor measured nor saved. `training.train` then takes the
run back (`engine/rewinds.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

import lightning
import torch

from vlm_train.distributed import collectives
from vlm_train.engine.rewinds import Spike
from vlm_train.engine.rundir import RunDirectory, read_lines
from vlm_train.types import Batch

DEVIATION = 1.4826
"""Median absolute deviations in the standard deviation of a normal distribution."""


class Spikes(lightning.Callback):
    """Raises `Spike`, on all ranks at the same step.

    Args:
        run: the run's directory.
        threshold: standard deviations above the median of the last losses at which a loss is refused; None refuses
            only what is not finite.
        window: number of losses; fewer are not judged by.
    """

    def __init__(self, *, run: RunDirectory, threshold: float | None, window: int) -> None:
        self.run, self.threshold = run, threshold
        self._losses: deque[float] = deque(maxlen=window)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Takes the losses that were recorded before a resume."""
        if self.threshold is not None:
            self._losses.extend(row["loss"] for row in read_lines(self.run.metrics))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Judges this step. An overflowing gradient is the business of fp16's scaler, which leaves the step out."""
        row = outputs["row"]
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        limit = self._limit()
        reason, value = "", row["loss"]
        if not math.isfinite(value):
            reason = "the loss is not finite"
        elif limit is not None and value > limit:
            reason = "the loss is above the threshold"
        elif not is_scaled and not math.isfinite(row["grad_norm"]):
            reason, value = "the gradient norm is not finite", row["grad_norm"]
        agreed = collectives.all_reduce_max(torch.tensor([int(bool(reason))], device=pl_module.device))
        if agreed.item():
            raise Spike(step=batch["step"], reason=reason or "as another rank finds", value=value, limit=limit)
        self._losses.append(row["loss"])

    def _limit(self) -> float | None:
        if self.threshold is None or len(self._losses) < (self._losses.maxlen or 0):
            return None
        return limit_of(self._losses, self.threshold)


def limit_of(losses: Iterable[float], threshold: float) -> float:
    """Median plus `threshold` standard deviations, told from the median absolute deviation: a few spikes among the
    losses move neither."""
    known = list(losses)
    middle = median(known)
    return middle + threshold * DEVIATION * median(abs(loss - middle) for loss in known)
