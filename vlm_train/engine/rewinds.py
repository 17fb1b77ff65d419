"""Going back after a spike: the steps that led to it are taken back, and the run goes on with the data behind them.

A *spike* is a step that `callbacks/spikes.py` refuses. At spike step s the run returns to the state after its first
a = s - `spikes.rewind_steps` steps, and there reads on where the stream stands behind the batch of s. So it passes over
the batch that was met and the `rewind_steps` batches before it. PaLM (arXiv 2204.02311, 5.1) went back about 100 steps
and passed over 200 to 500 batches: the same data did not spike from another state, so it is both that must change. With
`rewind_steps` 0 it is the offending batch alone, which is enough where the batch itself is what is wrong.

What is learned depends on a alone, and not on where a checkpoint happens to lie: the run starts from the newest one at
or before a (from the beginning, where there is none), and the steps up to a come again exactly as they were.

The only record is the `rewind` line of events.jsonl, written after the checkpoints beyond a are gone. Killed before
that line, a run meets the spike again; killed behind it, it reads the line: the same either way. What a checkpoint has
left out stands in its loader state and must be what the lines tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_train.distributed import collectives
from vlm_train.engine import checkpoints
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import VlmError
from vlm_train.log import get_logger
from vlm_train.types import stream_step

LOG = get_logger(__name__)

Rows = Sequence[Mapping[str, Any]]


class Spike(VlmError):
    """A step was refused. `step` counts from 0; `limit` is what the loss may be, None where it must only be finite."""

    def __init__(self, *, step: int, reason: str, value: float, limit: float | None) -> None:
        super().__init__(f"step {step + 1} is a spike: {reason}", got=value, allowed=limit)
        self.step, self.reason, self.value, self.limit = step, reason, value, limit


class Diverged(VlmError):
    """Spikes go on after `spikes.max_rewinds` rewinds."""


def jumps_of(taken: Rows) -> list[tuple[int, int]]:
    """Where a run with these `rewind` lines jumps in the stream (`types.Jumps`); the later line counts."""
    jumps: list[tuple[int, int]] = []
    for row in taken:
        jumps = [jump for jump in jumps if jump[0] < row["kept"]] + [(row["kept"], row["skipped"][1])]
    return jumps


def go_back(
    run: RunDirectory, spike: Spike, taken: Rows, *, rewind_steps: int, max_rewinds: int
) -> tuple[dict[str, Any], Path | None]:
    """Takes the steps that led to a spike back: (the new `rewind` line, the checkpoint to go on from).

    None for the checkpoint: from the beginning. Collective. `taken`: the `rewind` lines so far, equal on every rank.
    Raises Diverged when they are too many.
    """
    kept = max(spike.step - rewind_steps, 0)
    jumps = jumps_of(taken)
    first, stop = stream_step(kept, jumps), stream_step(spike.step, jumps) + 1
    row = {
        "step": spike.step + 1,
        "reason": spike.reason,
        "value": spike.value if math.isfinite(spike.value) else str(spike.value),
        "threshold": spike.limit,
        "kept": kept,
        "skipped": [first, stop],
    }
    if len(taken) >= max_rewinds:
        raise Diverged(
            f"step {row['step']} is a spike after {len(taken)} rewinds: {spike.reason}",
            got=row["value"],
            allowed=f"finite, at most {spike.limit:g}" if spike.limit is not None else "a finite number",
            remedy="for a new run a lower optim.lr, optim=stable_adamw, more schedule.warmup_steps or more "
            "spikes.rewind_steps; to go on with this one a larger spikes.max_rewinds",
        )
    name = None
    if collectives.rank() == 0:
        checkpoints.retire_after(run.checkpoints, kept)
        checkpoint = checkpoints.newest(run.checkpoints)
        run.event("rewind", row)
        run.rewind(checkpoints.step_of(checkpoint) if checkpoint else 0)
        name = checkpoint.name if checkpoint else None
        LOG.warning("step %d is a spike: %s (%s). Back to step %d, and on without batches [%d, %d) of the stream",
                    row["step"], spike.reason, row["value"], kept, first, stop)  # fmt: skip
    name = collectives.gather_objects(name)[0]
    return row, run.checkpoints / name if name else None
