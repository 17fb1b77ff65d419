"""`vlm-train data curate`: a chain of steps that a config describes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig, OmegaConf

from vlm_train.cli.compose import composed, of_root, own, resolve
from vlm_train.cli.options import local, out_folder
from vlm_train.errors import ConfigError
from vlm_train.schema import plain
from vlm_train.signatures import check_targets

if TYPE_CHECKING:
    from vlm_train.curation.chain import Step


@dataclass
class RayConfig:
    """Of engine ray."""

    address: str | None = None  # HOST:PORT; null: a cluster of this machine


@dataclass
class SlurmConfig:
    """Of engine slurm, each as sbatch takes it; null is left out."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Any = None  # of a task, in quotes: '01:00:00'
    mem: Any = None  # of a task
    cpus: int | None = None  # of a task
    gres: str | None = None  # of a task that runs a model: gpu:1


@dataclass
class CurationConfig:
    """What is done, and where."""

    steps: dict[str, Any] = field(default_factory=dict)  # name -> step; they run in this order
    engine: str = "local"
    num_workers: int | None = None  # at a time; null: as many as there is room for
    ray: RayConfig = field(default_factory=RayConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class CurateConfig:
    """The root of every config of curation."""

    curation: CurationConfig = field(default_factory=CurationConfig)
    shards: Any = MISSING
    out: str = MISSING
    selection: str | None = None
    device: str | None = None


def main(words: list[str]) -> None:
    """Runs the action."""
    from vlm_train.cli import curate, engines

    config = composed(words, _curation)
    _check(config)
    options = {
        "--out": out_folder("out=", config.out),
        "--selection": None if config.selection is None else local("selection=", config.selection),
        "--device": config.device,
        **engines.options_of(plain(config.curation)),
    }
    curate.write_selection(_listed(plain(config.shards)), lambda: _steps(config), options)


def _listed(shards: Any) -> list[str]:
    listed = [shards] if isinstance(shards, str) else shards
    if not isinstance(listed, list) or not listed or not all(isinstance(shard, str) for shard in listed):
        raise ConfigError("shards are no places", got=shards, allowed="a text, or a list of texts",
                          remedy="shards=data/openmoji/train")  # fmt: skip
    return listed


def _curation(overrides: list[str]) -> DictConfig:
    config = own(of_root("curate", CurateConfig, overrides))
    resolve(config)
    return config


def _check(config: DictConfig) -> None:
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{', '.join(missing)} has no value", got="nothing", allowed="a value",
                          remedy=f"add {missing[0]}=...")  # fmt: skip
    steps: Any = plain(config.curation.steps)
    if not steps or not all(isinstance(step, dict) and "_target_" in step for step in steps.values()):
        raise ConfigError("a chain of curation has steps", got=steps or "none", allowed="{NAME: {_target_: ...}}",
                          remedy="curation=copies, or a file of that shape")  # fmt: skip
    check_targets(steps, "curation.steps")


def _steps(config: DictConfig) -> dict[str, Step]:
    from vlm_train import build
    from vlm_train.curation.chain import Step

    steps = {str(name): build.make(step) for name, step in config.curation.steps.items()}
    if wrong := [name for name, step in steps.items() if not isinstance(step, Step)]:
        raise ConfigError(f"curation.steps.{wrong[0]} is no step", got=config.curation.steps[wrong[0]]._target_,
                          allowed="a step, such as vlm_train.curation.rules.ImageRules",
                          remedy="docs/curation.md lists them")  # fmt: skip
    return steps
