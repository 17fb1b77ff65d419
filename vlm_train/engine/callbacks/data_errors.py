"""Every sample that could not be read is recorded, and too many of them end the run, on all ranks at the same step.

The rate is that of the whole run over all ranks, so it does not depend on how many there are. What has gone before is
counted from data_errors.jsonl itself, so a resumed run judges as an untouched one would.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch

from vlm_train.distributed import collectives
from vlm_train.engine.bad_samples import first_of, record_errors
from vlm_train.engine.rundir import RunDirectory, read_lines
from vlm_train.errors import DataError
from vlm_train.types import Batch

MIN_SAMPLES = 1000  # below this many samples (or a whole epoch) a rate of bad ones says little


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
