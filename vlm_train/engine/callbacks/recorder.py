"""One row of metrics.jsonl per step, and a progress line a person can read.

metrics.jsonl is the truth; W&B is fed from the same row. Only rank 0 writes it. Everything in a row is a function of
config and step alone, but for the columns named in MACHINE_COLUMNS, which measure the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import nn

from vlm_train.engine.flops import num_images, num_tokens, peak_flops, shapes_of, training_flops_per_sample
from vlm_train.engine.ledger import Ledger, columns, lives_of
from vlm_train.engine.rundir import RunDirectory, append_line
from vlm_train.log import get_logger
from vlm_train.types import Batch

MACHINE_COLUMNS = ("samples_per_second", "data_wait", "mfu")
LOG_EVERY_SECONDS = 30.0
LOG = get_logger(__name__)

Sink = Callable[[Mapping[str, Any]], None]


class Recorder(lightning.Callback):
    """Writes rows and progress.

    Args:
        run: the run's directory.
        global_batch: samples of one step over all ranks.
        num_steps: length of the run.
        sinks: called on rank 0 with each row after it is written (W&B).
        ledger: whose shares of time go to the sinks too; None: none do.
    """

    def __init__(
        self, *, run: RunDirectory, global_batch: int, num_steps: int, sinks: list[Sink], ledger: Ledger | None = None
    ) -> None:
        self.run, self.global_batch, self.num_steps, self.sinks = run, global_batch, num_steps, sinks
        self.ledger = ledger
        self._lives: list[dict[str, Any]] = []  # of the run's processes before this one
        self._peak: float | None = None
        self._shapes: nn.Module | None = None
        self._flops: dict[tuple[int, float | None], float] = {}
        self._step_ended = self._step_started = time.perf_counter()
        self._progress = Progress(num_steps)

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Keeps the shapes of the model before it is sharded: what counts by running must not wait for other ranks."""
        self._shapes = shapes_of(pl_module.model)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Measures what the machine could do at best, and reads how time went before."""
        if self.ledger is not None:
            self._lives = [row for row in lives_of(self.run.time_of(0)) if row["life"] < self.ledger.life]
        self._peak = self._measured_peak(trainer, pl_module.device)
        self._step_ended = time.perf_counter()

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """The batch is here: waiting ends, computing starts."""
        self._step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Writes what this step learned and what it cost."""
        step = batch["step"] + 1
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        seconds = now - self._step_ended
        rate = self.global_batch / seconds
        flops = self._flops_per_sample(num_tokens(batch), num_images(batch))
        row = {
            "step": step,
            "samples": step * self.global_batch,
            **outputs["row"],
            "samples_per_second": round(rate, 3),
            "data_wait": round((self._step_started - self._step_ended) / seconds, 5),
            "mfu": self._utilisation(rate * flops, trainer, pl_module.device),
        }
        append_line(self.run.metrics, row)
        for sink in self.sinks:
            sink(row if self.ledger is None else row | columns(self._lives, self.ledger))
        self._progress.show(row)

    def _utilisation(self, flops: float, trainer: lightning.Trainer, device: torch.device) -> float | None:
        if self._peak and flops > self._peak:  # it was measured while others used the cores
            # not below what was just reached, so that it is measured again after a new record only
            self._peak = max(flops, self._measured_peak(trainer, device) or 0.0)
        return round(flops / self._peak, 5) if self._peak else None

    @staticmethod
    def _measured_peak(trainer: lightning.Trainer, device: torch.device) -> float | None:
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        peak = peak_flops(device, torch.float64 if trainer.precision == "64-true" else dtype)
        return peak * trainer.world_size if peak else None

    def _flops_per_sample(self, num_text_tokens: int, num_images: float | None) -> float:
        """Kept by what it depends on: a foreign tower counts by running once."""
        key = (num_text_tokens, num_images)
        if key not in self._flops:
            self._flops[key] = training_flops_per_sample(self._shapes, num_text_tokens, num_images)
        return self._flops[key]

    def mark_step_end(self) -> None:
        """Starts the clock of the next step."""
        self._step_ended = time.perf_counter()


class StepEnd(lightning.Callback):
    """Stands last among the callbacks, so that evaluation and checkpoints are not booked as waiting for data."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Everything that this step asked for is done."""
        self.recorder.mark_step_end()


class Progress:
    """One line that is rewritten on a terminal; one line each 30 seconds in a log."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.is_terminal = sys.stderr.isatty()
        self._last_line = 0.0
        self._rates: list[float] = []

    def show(self, row: Mapping[str, Any]) -> None:
        """Shows a metrics row if it is time to."""
        self._rates = [*self._rates[-19:], row["samples_per_second"]]
        now = time.monotonic()
        is_last = row["step"] == self.num_steps
        if now - self._last_line < (0.2 if self.is_terminal else LOG_EVERY_SECONDS) and not is_last:
            return
        self._last_line = now
        line = self._line(row)
        if self.is_terminal:
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if is_last else ""))
            sys.stderr.flush()
        else:
            LOG.info(line)

    def _line(self, row: Mapping[str, Any]) -> str:
        rate = sum(self._rates) / len(self._rates)
        samples_a_step = row["samples"] / row["step"]
        minutes = (self.num_steps - row["step"]) * samples_a_step / rate / 60
        utilisation = f" mfu {row['mfu']:.0%}" if row["mfu"] else ""
        return (
            f"step {row['step']}/{self.num_steps} loss {row['loss']:.4f} lr {row['lr']:.2e} grad {row['grad_norm']:.2f}"
            f" {rate:.0f} samples/s wait {row['data_wait']:.0%}{utilisation} eta {minutes:.1f} min"
        )
