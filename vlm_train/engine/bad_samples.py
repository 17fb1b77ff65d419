"""The rows of data_errors.jsonl: what was bad, met while indexing (step 0) or in a step."""

from __future__ import annotations

from typing import Any

from vlm_train.distributed import collectives
from vlm_train.engine.rundir import RunDirectory, append_line
from vlm_train.errors import DataError
from vlm_train.log import get_logger

NUM_SHOWN = 5
LOG = get_logger(__name__)


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
