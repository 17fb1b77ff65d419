"""Saves complete state every so many steps, at the end, and when a signal asks for it (`stops`)."""

from __future__ import annotations

import signal
from typing import Any

import lightning

from vlm_train.engine import checkpoints
from vlm_train.engine.rewinds import Spike
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.saving import Saver
from vlm_train.engine.stops import Interrupted, StopSignals
from vlm_train.engine.strategies import state_of
from vlm_train.errors import CheckpointError
from vlm_train.log import get_logger
from vlm_train.types import Batch

LOG = get_logger(__name__)
COPY_SECONDS = {True: 300.0, False: 20.0}
"""How long a run waits for the copy of its last checkpoint: at its end; after a signal, when a kill may follow."""


class Checkpoint(lightning.Callback):
    """Periodic, final and requested checkpoints.

    Args:
        run: the run's directory.
        saver: what writes them.
        every_steps: period.
        num_steps: the last step, which is always saved.
    """

    def __init__(self, *, run: RunDirectory, saver: Saver, every_steps: int, num_steps: int) -> None:
        self.run, self.saver, self.every_steps, self.num_steps = run, saver, every_steps, num_steps
        self._stops = StopSignals()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Takes the signals over."""
        self._stops.take()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Gives them back."""
        self._stops.give_back()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Gives them back, but after `Interrupted`: a second Ctrl-C still ends at once. What is being written is
        finished first, for a rewind will look for it. A run that goes back hears of a signal again; one that fails has
        failed, whatever was sent to its ranks meanwhile, as srun does beside one that died."""
        if isinstance(exception, Interrupted):
            return
        try:
            self.saver.join()
        except CheckpointError as error:
            if isinstance(exception, Spike):
                raise
            LOG.warning("%s", error)  # what ends the run is told by whoever catches it
        finally:
            self._stops.give_back()
            if isinstance(exception, Spike):
                self._stops.send_again()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Saves when it is time, or when any rank was asked to stop."""
        step = batch["step"] + 1
        requested = self._stops.agreed(pl_module.device)
        is_last = step == self.num_steps
        if not (requested or step % self.every_steps == 0 or is_last):
            return
        self.saver.save(step, state_of(trainer))
        if not (requested or is_last):
            return
        self.saver.finish(COPY_SECONDS[is_last])
        trainer.strategy.barrier("checkpoint")  # what rank 0 has committed is there for every rank
        if requested and not is_last:
            if trainer.is_global_zero:
                self.run.event("interrupted", {"step": step, "signal": signal.Signals(requested).name})
            raise Interrupted(requested, step, self.run.checkpoints / checkpoints.name_of(step))
