"""Saves complete state every so many steps, at the end, and when a signal asks for it.

A signal handler only sets a flag. The flag is agreed on by all ranks at the end of a step (a maximum over ranks, so one
signalled rank is enough), every rank saves at that same step, and the run ends with the shell's code for the signal.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch

from vlm_train.distributed import collectives
from vlm_train.engine import checkpoints
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import CheckpointError, VlmError
from vlm_train.log import get_logger
from vlm_train.types import Batch

LOG = get_logger(__name__)


class Interrupted(VlmError):
    """The run was asked to stop and has saved its state. Exit code 128 + signal, as shells use."""

    def __init__(self, signum: int, step: int, path: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; state is in {path}",
            remedy="run the same command again: it resumes",
        )
        self.exit_code = 128 + signum


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
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Takes the signals over: Lightning's own SIGTERM path ends a run without saving it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Nobody asks for the flag any more: the signals go back, and one that came too late to be seen is sent again.
        After `Interrupted` they stay: a second Ctrl-C still ends at once."""
        if isinstance(exception, Interrupted):
            return
        self.on_train_end(trainer, pl_module)
        if self._signal:
            signal.raise_signal(self._signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signal and signum == signal.SIGINT:
            os._exit(128 + signum)
        self._signal = signum

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Saves when it is time, or when any rank was asked to stop."""
        step = batch["step"] + 1
        requested = int(collectives.all_reduce_max(torch.tensor([self._signal], device=pl_module.device)).item())
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
