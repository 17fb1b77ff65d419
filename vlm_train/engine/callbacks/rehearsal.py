"""Whole steps with one micro-batch after another, in a process that does nothing else (`engine/rehearsal.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.rehearsal import Search, keep_margin
from vlm_train.engine.rundir import append_line
from vlm_train.types import Batch

NUM_STEPS = 2
"""The optimizer's state comes with the first, and lies beside the activations of the second; DistributedDataParallel
makes its buffers anew behind the first."""


class Rehearsed(Exception):
    """Every size that had to be tried has been."""


class Rehearsal(lightning.Callback):
    """Tries sizes before the first step, and ends the process's training with `Rehearsed`.

    Args:
        search: which size is next.
        batch: this rank's share of a step, on the host.
        record: the file to which sizes are written, `{size}` before one is tried and `{size, fits}` behind it.
    """

    def __init__(self, search: Search, batch: Batch, record: Path) -> None:
        self.search, self.batch, self.record = search, batch, record

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Tries until a size does not fit, which is an error, or the answer is known. Raises Rehearsed."""
        keep_margin(pl_module.device)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            # it wants of an exchange a result that the one with nobody has not; its buffers stay as they are
            trainer.strategy.model.register_comm_hook(None, noop_hook)
        while (size := self.search.next()) is not None:
            append_line(self.record, {"size": size})
            try_size(trainer, pl_module, self.batch, size)
            append_line(self.record, {"size": size, "fits": True})
            self.search.tried[size] = True
        raise Rehearsed


def try_size(trainer: lightning.Trainer, module: Any, batch: Batch, size: int) -> None:
    """Steps as the trainer's loop takes them, with micro-batches of `size` samples. Weights change by them."""
    step = module.gradient_step
    step.plan = replace(step.plan, budgets=Budgets(samples=size))
    for _ in range(NUM_STEPS):
        trainer.strategy.training_step(trainer.strategy.batch_to_device(dict(batch)), 0)
