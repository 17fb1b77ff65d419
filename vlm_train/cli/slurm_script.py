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
from vlm_train.errors import ConfigError

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

    Raises:
        ConfigError: a path or a name that SLURM, or a container, cannot be told.
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
    text = re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], (slurm_dir() / "train.sbatch").read_text())
    for line in text.split("\n"):
        if re.search("[\ud800-\udfff]", line):  # bytes of the command line that are no UTF-8
            raise ConfigError("a job is written in UTF-8", got=repr(line), allowed="names and values in UTF-8",
                              remedy="rename the folder, or give the value in UTF-8")  # fmt: skip
    return text


def _directives(config: DictConfig, launch: LaunchConfig, folder: Path, num_tasks: int) -> list[str]:
    """Options of sbatch. Each rank is one task of SLURM."""
    options = {
        "job-name": f"{config.run.experiment}-{config.run.id}",
        "nodes": config.trainer.num_nodes,
        "ntasks-per-node": config.trainer.devices,
        "cpus-per-task": _cpus(config, launch),
        "gres": _gpus(config) and ":".join(filter(None, ("gpu", launch.gpu_type, str(config.trainer.devices)))),
        "mem": launch.mem,
        "time": str(launch.time),  # 0, no limit, is said too
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "signal": f"USR1@{launch.signal_seconds}",
        "chdir": Path.cwd(),
        "output": f"{_without_patterns(folder)}/{'%a.' if num_tasks > 1 else ''}{LOG}",
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
    for path in own:
        if re.search("[:,]", str(path)):
            raise ConfigError("a container cannot be given a folder whose name has a colon or a comma", got=path,
                              allowed="other characters", remedy="rename the folder, or run.dir=...")  # fmt: skip
    return [*(f"{path}:{path}" for path in own), *launch.container_mounts]


def _without_patterns(folder: Path) -> str:
    """A folder as --output takes it, which reads %j and the like; a backslash would turn patterns off, %a with them."""
    if "\\" in str(folder):
        raise ConfigError("SLURM writes no log into a folder whose name has a backslash", got=folder,
                          allowed="other characters", remedy="rename the folder, or run.dir=...")  # fmt: skip
    return str(folder).replace("%", "%%")


def _word(word: str) -> str:
    """An option as a line of #SBATCH takes it. In quotes sbatch takes all characters as they are but the quote and the
    backslash, which a backslash keeps; outside of them a # would begin a comment."""
    if "\n" in word:
        raise ConfigError("an option of sbatch is one line", got=repr(word), allowed="no line break",
                          remedy="a name without one")  # fmt: skip
    if re.fullmatch(r"[\w=:./,%@+-]+", word, re.ASCII):
        return word
    return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'
