"""The batch script of a job: slurm/train.sbatch with the values of a config and of `launch` put in."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_train.cli.paths import slurm_dir
from vlm_train.engine.requeue import REQUEUE_EXIT

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.cli.slurm_config import LaunchConfig

CODE = "code"  # in the folder of a submission, as are the two below
LOG = "log.txt"
TASKS = "tasks"


def script(config: DictConfig, launch: LaunchConfig, folder: Path, tasks: Sequence[Path]) -> str:
    """The text of job.sbatch.

    Args:
        config: of the run; of one of several runs, which ask for the same machines.
        launch: what the job asks for.
        folder: absolute path of the submission.
        tasks: absolute path of the folder of each run, in it.
    """
    values = {
        "TITLE": f"{config.run.experiment}: {folder}",
        "DIRECTIVES": "\n".join(f"#SBATCH {_word(word)}" for word in _directives(config, launch, folder, len(tasks))),
        "SETUP": "\n".join(launch.setup) or "# launch.setup: nothing",
        "CODE": shlex.quote(str(folder / CODE)),
        "MAX_REQUEUES": str(launch.max_requeues),
        "TASKS": "\n".join(f"    {shlex.quote(str(task))}" for task in tasks),
        "SRUN": shlex.join(_srun(config, launch, folder)),
        "SRUN_RANKS": shlex.join([*_srun(config, launch, folder), *(["--gpu-bind=none"] if _gpus(config) else [])]),
        "PYTHON": shlex.join(_python(launch, folder)),
        "REQUEUE_EXIT": str(REQUEUE_EXIT),
    }
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], (slurm_dir() / "train.sbatch").read_text())


def _directives(config: DictConfig, launch: LaunchConfig, folder: Path, num_tasks: int) -> list[str]:
    """Options of sbatch. Each rank is one task of SLURM."""
    options = {
        "job-name": f"{config.run.experiment}-{config.run.id}",
        "nodes": config.trainer.num_nodes,
        "ntasks-per-node": config.trainer.devices,
        "cpus-per-task": _cpus(config, launch),
        "gres": _gpus(config) and ":".join(filter(None, ("gpu", launch.gpu_type, str(config.trainer.devices)))),
        "mem": launch.mem,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "signal": f"USR1@{launch.signal_seconds}",
        "chdir": _no_pattern(Path.cwd()),
        "output": f"{_no_pattern(folder)}/{'%a.' if num_tasks > 1 else ''}{LOG}",
        "open-mode": "append",
    }
    if num_tasks > 1:
        at_once = f"%{launch.max_at_once}" if launch.max_at_once else ""
        options["array"] = f"0-{num_tasks - 1}{at_once}"
    return ["--requeue", *(f"--{name}={value}" for name, value in options.items() if value), *launch.sbatch]


def _gpus(config: DictConfig) -> bool:
    return bool(config.trainer.accelerator != "cpu")


def _cpus(config: DictConfig, launch: LaunchConfig) -> int:
    return launch.cpus or config.data.num_workers + 1


def _srun(config: DictConfig, launch: LaunchConfig, folder: Path) -> list[str]:
    """Options of every srun; it does not take over --cpus-per-task of the job since SLURM 22.05."""
    options = [f"--cpus-per-task={_cpus(config, launch)}"]
    if launch.container and launch.container_runtime == "pyxis":
        mounts = ",".join(_mounts(launch, folder))
        options += [f"--container-image={launch.container}", f"--container-mounts={mounts}",
                    f"--container-workdir={Path.cwd()}"]  # fmt: skip
    return options


def _python(launch: LaunchConfig, folder: Path) -> list[str]:
    """The interpreter, inside of a container where there is one."""
    python = launch.python or ("python3" if launch.container else sys.executable)
    if launch.container and launch.container_runtime == "apptainer":
        mounts = ",".join(_mounts(launch, folder))
        return ["apptainer", "exec", "--nv", f"--bind={mounts}", f"--pwd={Path.cwd()}", launch.container, python]
    return [python]


def _mounts(launch: LaunchConfig, folder: Path) -> list[str]:
    """FROM:TO of the folder that the command is given in, of the run where that is elsewhere, and others."""
    run = folder.parent.parent
    own = [Path.cwd(), *([] if run.is_relative_to(Path.cwd()) else [run])]
    return [*(f"{path}:{path}" for path in own), *launch.container_mounts]


def _no_pattern(path: Path) -> str:
    """A path for sbatch, which would read %j and the like in it."""
    return str(path).replace("%", "%%")


def _word(word: str) -> str:
    """An option as a line of #SBATCH takes it: blanks in quotes."""
    return f'"{word}"' if re.search(r"\s", word) else word
