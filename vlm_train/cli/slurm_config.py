"""What `vlm-train submit` takes beside the words of train: the group `launch`, of a root of its own, which no run and
no learning ever sees."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig

from vlm_train.cli.compose import composed, of_root, own, resolve
from vlm_train.cli.options import MANY
from vlm_train.cli.slurm_time import ALLOWED, seconds_of
from vlm_train.errors import ConfigError

_CHOICES = {"container_runtime": ("pyxis", "apptainer")}
_RANGES = {"cpus": (1, MANY), "signal_seconds": (1, 65535), "max_requeues": (0, MANY), "max_at_once": (1, MANY)}
_SETTLED = {
    **{key: f"launch.{key}=..." for key in ("partition", "account", "qos", "constraint", "time", "mem")},
    "signal": "launch.signal_seconds=...", "cpus-per-task": "launch.cpus=...", "nodes": "trainer.num_nodes=...",
    "ntasks-per-node": "trainer.devices=...", "array": "--sweep KEY=A,B", "chdir": "cd FOLDER",
    "output": "run.dir=...", "open-mode": "leave it out", "requeue": "leave it out",
    "no-requeue": "launch.max_requeues=0",
}  # fmt: skip
"""Options of sbatch that a job has from elsewhere: what says them."""


@dataclass
class LaunchConfig:
    """How a job asks SLURM for machines, and what it does before it trains; conf/launch/slurm.yaml tells each key."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Any = MISSING
    mem: str | None = None
    cpus: int | None = None
    gpu_type: str | None = None
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    python: str | None = None
    container: str | None = None
    container_runtime: str = "pyxis"
    container_mounts: list[str] = field(default_factory=list)
    signal_seconds: int = 120
    max_requeues: int = 100
    max_at_once: int | None = None
    dry_run: bool = False


@dataclass
class SubmitConfig:
    """The root of what `submit` reads for itself."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)


def is_of_launch(word: str) -> bool:
    """Whether a word of the command line is about the job and not about the run."""
    return re.match(r"\+*launch[.=]", word) is not None


def compose_launch(words: Sequence[str]) -> LaunchConfig:
    """The job that `launch=CHOICE` and `launch.KEY=VALUE` describe. Raises ConfigError."""
    launch = LaunchConfig(**composed(words, _submission).launch)
    for key, allowed in _CHOICES.items():
        if getattr(launch, key) not in allowed:
            raise ConfigError(f"launch.{key} has no such choice", got=getattr(launch, key), allowed=", ".join(allowed),
                              remedy=f"launch.{key}={allowed[0]}")  # fmt: skip
    for key, (low, high) in _RANGES.items():
        value = getattr(launch, key)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"launch.{key} is out of range", got=value, allowed=f"{low} to {high}",
                              remedy=f"launch.{key}={low if value < low else high}")  # fmt: skip
    for line in _texts(launch):
        if "\n" in line:
            raise ConfigError("a value of launch has more than one line", got=repr(line), allowed="one line each",
                              remedy="several lines as a list: launch.setup='[\"...\",\"...\"]'")  # fmt: skip
    _check_time(launch)
    _check_words(launch)
    _check_setup(launch.setup)
    return launch


def _check_time(launch: LaunchConfig) -> None:
    seconds = seconds_of(str(launch.time))
    if seconds is None:
        raise ConfigError("launch.time is no time of SLURM", got=launch.time,
                          allowed=f"{ALLOWED}, in YAML in quotes; 0 is no limit",
                          remedy="launch.time=24:00:00")  # fmt: skip
    if 0 < seconds <= launch.signal_seconds:
        raise ConfigError("a job would be told to save from its start on",
                          got=f"launch.time={launch.time} launch.signal_seconds={launch.signal_seconds}",
                          allowed="a time that is longer than launch.signal_seconds",
                          remedy="a longer launch.time, or a smaller launch.signal_seconds")  # fmt: skip


def _check_words(launch: LaunchConfig) -> None:
    """What sbatch, or a container, would refuse when the job is sent or runs."""
    if launch.mem and not re.fullmatch("[0-9]{1,12}(?:[KMGT]B?)?", launch.mem, re.IGNORECASE):
        raise ConfigError("launch.mem is no memory of SLURM", got=launch.mem, allowed="MEGABYTES, or N with K, M, G, T",
                          remedy="launch.mem=64G")  # fmt: skip
    for option in launch.sbatch:
        name = re.fullmatch("--([a-z][a-z0-9-]*)(?:=.*)?", option)
        if not name:
            raise ConfigError("launch.sbatch has what is no option", got=option, allowed="--NAME or --NAME=VALUE each",
                              remedy="launch.sbatch='[\"--exclusive\",\"--mail-type=FAIL\"]'")  # fmt: skip
        if name[1] in _SETTLED:
            raise ConfigError("launch.sbatch has an option that is said elsewhere", got=option,
                              allowed="options that nothing else says",
                              remedy=_SETTLED[name[1]])  # fmt: skip
    for mount in launch.container_mounts:
        if not re.fullmatch("/[^:,]*:/[^:,]*(?::[^:,]+)?", mount):
            raise ConfigError("launch.container_mounts has what is no mount", got=mount,
                              allowed="FROM:TO or FROM:TO:FLAGS, absolute paths",
                              remedy="launch.container_mounts='[\"/data:/data\"]'")  # fmt: skip


def _check_setup(lines: Sequence[str]) -> None:
    """Bash reads the lines: a quote that is never closed would take the rest of the job into itself."""
    if not lines or shutil.which("bash") is None:
        return
    read = subprocess.run(["bash", "-n"], input="\n".join([*lines, ""]), capture_output=True, text=True,
                          errors="surrogateescape", env={**os.environ, "LC_ALL": "C"})  # fmt: skip
    if read.stderr:  # a warning, too: a here-document without an end
        raise ConfigError(f"launch.setup is no bash: {read.stderr.splitlines()[0].removeprefix('bash: ')}",
                          got=" | ".join(lines), allowed="lines that are whole in themselves",
                          remedy="""write them into a file: launch.setup='["source FILE"]'""")  # fmt: skip


def _texts(launch: LaunchConfig) -> list[str]:
    values = [value for value in vars(launch).values() if isinstance(value, str)]
    return [*values, *launch.sbatch, *launch.setup, *launch.container_mounts]


def _submission(overrides: list[str]) -> DictConfig:
    config = own(of_root("submit", SubmitConfig, overrides))
    resolve(config)
    return config
