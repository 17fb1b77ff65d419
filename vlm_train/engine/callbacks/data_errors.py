"""Every sample that could not be read is recorded, and too many of them end the run, on all ranks at the same step.

The rate is that of the whole run over all ranks, so it does not depend on how many there are. What has gone before is
counted from data_errors.jsonl itself, so a resumed run judges as an untouched one would.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch

from vlm_train.distributed import collectives
from vlm_train.engine.rundir import RunDirectory, append_line, read_lines
from vlm_train.errors import DataError
from vlm_train.log import get_logger
from vlm_train.types import Batch

MIN_SAMPLES = 1000  # below this many samples (or a whole epoch) a rate of bad ones says little
NUM_SHOWN = 5
LOG = get_logger(__name__)


class DataErrors(lightning.Callback):
    """Writes data_errors.jsonl for the training split.

    Args:
        run: the run's directory.
        global_batch: samples of one step over all ranks.
        max_error_rate: share of bad samples above which the run stops with a DataError.
        samples_per_epoch: the rate is judged from min(1,000, this) samples on; None is not known.
    """

    def __init__(
        self, *, run: RunDirectory, global_batch: int, max_error_rate: float, samples_per_epoch: int | None
    ) -> None:
        self.run, self.global_batch, self.max_error_rate = run, global_batch, max_error_rate
        self.min_samples = min(MIN_SAMPLES, samples_per_epoch or MIN_SAMPLES)
        self.num_bad = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Counts what was recorded before a resume."""
        self.num_bad = len(self._rows())

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Records this step's bad samples of all ranks, then judges the rate."""
        errors, step = batch["errors"], batch["step"] + 1
        count = collectives.all_reduce_sum(torch.tensor([len(errors)], device=pl_module.device))
        self.num_bad += int(count.item())
        if count.item():
            record_errors(self.run, step, "train", errors)
        num_read = step * self.global_batch
        if num_read >= self.min_samples and self.num_bad > self.max_error_rate * num_read:
            raise self._too_many(num_read)

    def _too_many(self, num_read: int) -> DataError:
        collectives.barrier()  # rank 0 has written by now
        return DataError(
            f"too many bad samples: {self.num_bad} of {num_read}; the first: {first_of(self._rows())}",
            got=f"a rate of {self.num_bad / num_read:.4f}",
            allowed=f"at most data.max_error_rate={self.max_error_rate}",
            remedy=f"look at {self.run.data_errors}; mend the shards, or raise data.max_error_rate",
        )

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in read_lines(self.run.data_errors) if row["split"] == "train" and row["step"] > 0]


def first_of(errors: list[dict[str, Any]]) -> str:
    """The first few as a line."""
    return "; ".join(f"{error['shard']} {error['key']}: {error['reason']}" for error in errors[:NUM_SHOWN])


def record_left_out(
    run: RunDirectory | None, split: str, errors: list[dict[str, Any]], num_samples: int, *, max_error_rate: float
) -> None:
    """What indexing left out, as rows of step 0 (where `run` is given), and a warning. Raises DataError if too much."""
    if not errors:
        return
    rate = len(errors) / (len(errors) + num_samples)
    if rate > max_error_rate:
        raise DataError(
            f"too many bad samples in data.{split}.shards: {len(errors)}; the first: {first_of(errors)}",
            got=f"a rate of {rate:.4f}",
            allowed=f"at most data.max_error_rate={max_error_rate}",
            remedy="mend the shards, or raise data.max_error_rate",
        )
    LOG.warning("%d bad samples in data.%s.shards are left out; the first: %s", len(errors), split, first_of(errors))
    if run is not None:
        for error in errors:
            append_line(run.data_errors, {"step": 0, "split": split, **error})


def record_errors(run: RunDirectory, step: int, split: str, errors: list[dict[str, Any]]) -> int:
    """Appends every rank's errors in rank order and returns how many there were. Collective."""
    everyone = [error for part in collectives.gather_objects(errors) for error in part]
    if collectives.rank() == 0:
        for error in everyone:
            append_line(run.data_errors, {"step": step, "split": split, **error})
    return len(everyone)
