"""Saves complete state every so many steps, at the end, and when a signal asks for it (`stops`)."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import lightning

from vlm_train.engine import checkpoints
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.stops import Interrupted, StopSignals
from vlm_train.errors import CheckpointError, VlmError
from vlm_train.types import Batch


class Checkpoint(lightning.Callback):
    """Periodic, final and requested checkpoints.

    Args:
        run: the run's directory.
        every_steps: period.
        keep: committed checkpoints that stay.
        num_steps: the last step, which is always saved.
    """

    def __init__(self, *, run: RunDirectory, every_steps: int, keep: int, num_steps: int) -> None:
        self.run, self.every_steps, self.keep, self.num_steps = run, every_steps, keep, num_steps
        self._stops = StopSignals()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Takes the signals over."""
        self._stops.take()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Gives them back."""
        self._stops.give_back()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Gives them up, but after `Interrupted`: a second Ctrl-C still ends at once."""
        if not isinstance(exception, Interrupted):
            self._stops.give_up()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Saves when it is time, or when any rank was asked to stop."""
        step = batch["step"] + 1
        requested = self._stops.agreed(pl_module.device)
        if not (requested or step % self.every_steps == 0 or step == self.num_steps):
            return
        path = self._save(trainer, step)
        if requested and step < self.num_steps:
            if trainer.is_global_zero:
                self.run.event("interrupted", {"step": step, "signal": signal.Signals(requested).name})
            raise Interrupted(requested, step, path)

    def _save(self, trainer: lightning.Trainer, step: int) -> Path:
        folder = self.run.checkpoints
        temporary: Path | None = None
        try:
            temporary = checkpoints.begin(folder, step) if trainer.is_global_zero else None
            trainer.save_checkpoint(str(Path(trainer.strategy.broadcast(str(temporary))) / checkpoints.STATE))
            final = checkpoints.commit(temporary, step, self.keep) if temporary else folder / checkpoints.name_of(step)
        except (OSError, RuntimeError, VlmError) as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {error}",
                got=f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free in {folder}",
                remedy="free space, then run the same command: it resumes from the last committed checkpoint",
            ) from error
        trainer.strategy.barrier("checkpoint")
        if trainer.is_global_zero:
            self.run.event("checkpoint", {"step": step, "path": final.name})
        return final
