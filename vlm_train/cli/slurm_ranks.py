"""A rank that srun started: torchrun's variables from SLURM's, signals from its first instant on, and its end."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import MutableMapping
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vlm_train.engine import checkpoints
from vlm_train.engine.requeue import REQUEUE_EXIT, Job, decide, requeue
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.stops import SIGNALS
from vlm_train.errors import ConfigError
from vlm_train.log import global_rank

STOP_SIGNALS = tuple(number for number in SIGNALS if number != signal.SIGINT)
"""Preemption; the end of the time that was asked for (`--signal`); `scancel --signal`."""


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Says where this process stands among the ranks in torchrun's words, where srun alone has said it.

    Raises:
        ConfigError: where rank 0 listens is not said.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    if lacking := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise ConfigError(f"ranks under srun need {' and '.join(lacking)}", got="not in the environment",
                          allowed="the first host of the job, and a port that is free there",
                          remedy="vlm-train submit writes a job that sets them")  # fmt: skip
    node = int(environment["SLURM_NODEID"])
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
        GROUP_RANK=str(node),
    )


def tasks_by_node(told: str) -> list[int]:
    """How many tasks each node has, of SLURM's short form: `4(x2),3` is [4, 4, 3]."""
    found: list[int] = []
    for part in told.split(","):
        number, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()  # type: ignore[union-attr]
        found += [int(number)] * int(times or 1)
    return found


def stop_before_training(run: RunDirectory) -> None:
    """Until training can save, a signal ends the job's step at once: rank 0 writes down that it was asked to.

    The other ranks wait for the end of rank 0, which srun makes that of the step: were they faster, nobody would know
    why they ended.
    """
    owner, committed = os.getpid(), checkpoints.committed(run.checkpoints)
    step = checkpoints.step_of(committed[-1]) if committed else 0

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner or global_rank() != 0:  # a forked worker has this handler too
            return
        run.event("interrupted", {"step": step, "signal": signal.Signals(signum).name})
        os._exit(128 + signum)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def train(directory: Path, checkpoint: Path | None, job: Job) -> None:
    """Trains this rank's share in a job of SLURM. Where the run was asked to stop and has saved, the job is queued
    again, and this does not return."""
    from vlm_train import training
    from vlm_train.cli.runs import locked
    from vlm_train.engine.stops import Interrupted

    run = RunDirectory(directory)
    with locked(run) if global_rank() == 0 else nullcontext():
        try:
            training.train(directory, checkpoint)
        except Interrupted as stopped:
            for number in STOP_SIGNALS:  # SLURM sends SIGTERM to what it queues again
                signal.signal(number, signal.SIG_IGN)
            if global_rank() == 0 and not decide(run, job, stopped.exit_code):
                raise
            if global_rank() == 0 and not requeue(run, job):
                os._exit(REQUEUE_EXIT)
            _wait_for_the_end()


def _wait_for_the_end() -> NoReturn:
    """SLURM ends what it queues again; where it refused, or nothing is queued again, the end of rank 0 ends the step.
    A rank that left by itself would make its job look FAILED or COMPLETED."""
    while True:
        time.sleep(60)
