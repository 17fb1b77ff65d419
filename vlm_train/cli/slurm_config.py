"""What `vlm-train submit` takes beside the words of train: the group `launch`, of a root of its own, which no run and
no learning ever sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig

from vlm_train.cli.compose import composed, of_root, own, resolve
from vlm_train.errors import ConfigError

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d(:\d\d)?)?")
_CHOICES = {"container_runtime": ("pyxis", "apptainer")}
_LEAST = {"cpus": 1, "signal_seconds": 1, "max_requeues": 0, "max_at_once": 1}


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
    for key, least in _LEAST.items():
        value = getattr(launch, key)
        if value is not None and value < least:
            raise ConfigError(f"launch.{key} is out of range", got=value, allowed=f">= {least}",
                              remedy=f"launch.{key}={least}")  # fmt: skip
    if not _TIME.fullmatch(str(launch.time)):
        raise ConfigError("launch.time is no time of SLURM", got=launch.time,
                          allowed="MINUTES, HH:MM:SS or DAYS-HH:MM:SS, in YAML in quotes",
                          remedy="launch.time=24:00:00")  # fmt: skip
    for line in _texts(launch):
        if "\n" in line:
            raise ConfigError("a value of launch has more than one line", got=repr(line), allowed="one line each",
                              remedy="several lines as a list: launch.setup='[\"...\",\"...\"]'")  # fmt: skip
    return launch


def _texts(launch: LaunchConfig) -> list[str]:
    values = [value for value in vars(launch).values() if isinstance(value, str)]
    return [*values, *launch.sbatch, *launch.setup, *launch.container_mounts]


def _submission(overrides: list[str]) -> DictConfig:
    config = own(of_root("submit", SubmitConfig, overrides))
    resolve(config)
    return config
