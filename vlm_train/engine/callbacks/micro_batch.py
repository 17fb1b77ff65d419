"""Before the first step, ranks agree on the smallest micro-batch that one of them has found (`engine/rehearsal.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning

from vlm_train.distributed import collectives
from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.rehearsal import Answer, known
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError
from vlm_train.log import get_logger

LOG = get_logger(__name__)


class MicroBatch(lightning.Callback):
    """Sets the micro-batch of the module; a new answer is told to the run.

    Args:
        run: the run's directory.
        answer: of this rank.
    """

    def __init__(self, run: RunDirectory, answer: Answer) -> None:
        self.run, self.answer = run, answer

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Collective. Raises ConfigError, on every rank, where one has no room for a single sample."""
        told = collectives.gather_objects([self.answer.samples, self.answer.conditions.device, len(self.answer.tried)])
        samples = min(row[0] for row in told)
        devices = sorted({device for _, device, _ in told})
        if not samples:
            raise ConfigError(
                "not even the smallest micro-batch fits", got=f"trainer.micro_batch=auto on {'; '.join(devices)}",
                allowed="a model with its optimizer that leaves room for a sample",
                remedy="strategy.recompute=true, strategy=fsdp2 on more ranks, or devices with more memory",
            )  # fmt: skip
        step = pl_module.gradient_step
        step.plan = replace(step.plan, budgets=Budgets(samples=samples))
        is_new = any(num_tried for _, _, num_tried in told) and known(self.run, self.answer.conditions) != samples
        if trainer.is_global_zero and is_new:  # not when a spike has begun the run anew
            self._tell(samples, step.plan.num_micro_batches, devices)

    def _tell(self, samples: int, num_micro_batches: int, devices: list[str]) -> None:
        about = {
            "micro_batch": samples,
            "num_micro_batches": num_micro_batches,
            "devices": devices,
            "ranks": self.answer.conditions.num_ranks,
            "settings": self.answer.conditions.settings,
            "tried": self.answer.tried,
            "seconds": round(self.answer.seconds, 1),
        }
        self.run.event("micro_batch", about)
        LOG.info("trainer.micro_batch=auto: %d samples at once, %d times a step", samples, num_micro_batches)
