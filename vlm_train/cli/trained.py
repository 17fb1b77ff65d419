"""What the verbs on a trained run share: which run, which of its checkpoints, and on what device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from vlm_train.engine.rundir import RunDirectory

RUN = "the directory of a run, such as runs/quickstart/latest"
CHECKPOINT = "one of its checkpoints; the newest that verifies if left out"
DEVICE = "auto, cpu, cuda or cuda:N"
STAGE = "stage-"
"""How the folders of the stages of a run begin; their numbers follow, so that they sort by name."""


def open_run(path: str, *, key: str = "run") -> RunDirectory:
    """The run that a user means; of a run in stages the last one that has weights. Raises ConfigError when there is
    none."""
    from vlm_train.engine.rundir import RunDirectory

    run = RunDirectory(path)
    if run.config.is_file():
        return last_stage(run)
    known = sorted(str(found.parent) for found in Path("runs").glob("*/*/config.yaml"))
    raise ConfigError(
        f"{path} is no run" if run.path.exists() else f"{path} does not exist",
        got=f"{key}={path}",
        allowed=f"a folder with config.yaml{': ' + ', '.join(known[-4:]) if known else ''}",
        remedy=f"{key}={known[-1]}" if known else "train one first: vlm-train train experiment=quickstart",
    )


def last_stage(run: RunDirectory) -> RunDirectory:
    """The last stage of a run in stages that has a checkpoint; a run without stages is its own."""
    from vlm_train.engine import checkpoints
    from vlm_train.engine.rundir import RunDirectory

    stages = [RunDirectory(path.parent) for path in run.path.glob(f"{STAGE}*/config.yaml")]
    trained = [stage for stage in stages if checkpoints.committed(stage.checkpoints)]
    return max(trained, key=lambda stage: stage.path.name, default=run)


def pinned(init: Any) -> Any:
    """`init` of a config with each run that it names as PATH_OF_CHECKPOINT@IDENTITY.

    Raises:
        ConfigError: it names neither a run nor a checkpoint.
        CheckpointError: that cannot be read, or there is none yet.
    """
    if isinstance(init, Mapping):
        return {part: _pinned(run, f"init.{part}") for part, run in init.items()}
    return _pinned(init, "init") if init else None


def _pinned(init: str, key: str) -> str:
    """A run stands for its newest checkpoint."""
    from vlm_train.cli.runs import is_checkpoint
    from vlm_train.engine import checkpoints

    if re.search(r"@[0-9a-f]{16}$", init):  # as the config of a run tells it
        return init
    path = Path(init)
    if is_checkpoint(path):
        checkpoints.verify(path)
    else:
        path = choose_checkpoint(open_run(init, key=key), None)
    return f"{path}@{checkpoints.identity(path)}"


def choose_checkpoint(run: RunDirectory, path: str | None) -> Path:
    """The checkpoint `path`, or the newest one; verified. Raises ConfigError or CheckpointError."""
    from vlm_train.cli.runs import is_checkpoint
    from vlm_train.engine import checkpoints

    if path is None:
        found = checkpoints.newest(run.checkpoints)
        if found is None:
            raise CheckpointError(f"{run.path} has no checkpoint yet", remedy="train it: the same command resumes it")
        return found
    chosen = Path(path) if Path(path).is_dir() else run.checkpoints / path
    if not is_checkpoint(chosen):
        names = ", ".join(found.name for found in checkpoints.committed(run.checkpoints))
        raise ConfigError(f"{path} is no checkpoint", got=f"checkpoint={path}", allowed=names or "none is there yet",
                          remedy="leave out checkpoint= for the newest")  # fmt: skip
    checkpoints.verify(chosen)
    return chosen


def choose_device(name: str | None) -> torch.device:
    """`auto` is the first GPU, the CPU where there is none. Raises ConfigError."""
    import torch

    has_gpu = torch.cuda.is_available()
    name = name or "auto"
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    number = name.removeprefix("cuda:") if name != "cuda" else "0"
    if has_gpu and number.isdecimal() and int(number) < torch.cuda.device_count():
        return torch.device(name)
    gpus = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}" if has_gpu else "no GPU is visible"
    raise ConfigError("no such device", got=f"device={name}", allowed=f"auto, cpu; {gpus}", remedy="device=auto")
