"""What a job will take, said before it is sent: the lines of `vlm-train plan` for its first run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vlm_train.cli.slurm_time import seconds_of
from vlm_train.errors import VlmError

if TYPE_CHECKING:
    from vlm_train.cli.planned import PlannedRun
    from vlm_train.cli.slurm_config import LaunchConfig


def plan_lines(run: PlannedRun, launch: LaunchConfig) -> list[str]:
    """Memory, hours, money and jobs in turn of a run; why not, where it cannot be planned. Nothing of a run on
    processors, whose speed nobody knows."""
    if run.config.trainer.accelerator == "cpu":
        return []
    from vlm_train.cli.plan import DISK, GPU, MFU, plans_of
    from vlm_train.cli.plan_page import brief
    from vlm_train.plan.estimate import Machine
    from vlm_train.plan.hardware import GPUS

    name = (launch.gpu_type or GPU).lower().replace("_", "-")
    if name not in GPUS:
        return [f"  not planned: launch.gpu_type={launch.gpu_type} is none of {', '.join(GPUS)}"]
    gpu = GPUS[name]
    machine = Machine(gpu=gpu, mfu=MFU, price=gpu.price, disk=DISK * 1e9)
    try:
        with _no_hub():
            plans = plans_of(run.config, run.stages, machine)
    except VlmError as error:
        return [f"  not planned: {error.what.splitlines()[0]}"]
    unsaid = "" if launch.gpu_type else ", since launch.gpu_type does not say"
    return [
        *brief(plans, machine, seconds_of(str(launch.time)) or None),
        f"  on {name}{unsaid}, at {MFU:.0%} of its peak, ${machine.price:.2f} an hour; more: vlm-train plan",
    ]


@contextmanager
def _no_hub() -> Iterator[None]:
    """A hub that is out of reach is asked for half a minute a model; the job, which gets this environment, may ask."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
