"""A run in stages: one config, trained as several ordinary runs one after another, in folders below the run's own.

Each stage is the config of the command line with the changes that `stages.NAME` lists, and with the weights of the
stage before as its `init`; its learning rate and its schedule are its own and begin anew. A word of the command line
holds in every stage (`trainer.devices=8`) or in one (`stages.NAME.optim.lr=1e-4`); one for all stages of a key that a
stage changes is refused. Resuming, refusing a changed config and reporting are those of ordinary runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vlm_train.cli.compose import compose_config
from vlm_train.cli.overrides import is_group, read, split_config_dir
from vlm_train.cli.trained import STAGE
from vlm_train.errors import ConfigError
from vlm_train.schema import flatten

if TYPE_CHECKING:
    from vlm_train.engine.rundir import RunDirectory

Stages = dict[str, DictConfig]
"""Folder name -> config, in order."""


def compose_stages(config: DictConfig, words: Sequence[str]) -> Stages:
    """The config of every stage, checked; none where the config has no stages. Raises ConfigError."""
    changes: Any = OmegaConf.to_container(config.stages)
    return {
        f"{STAGE}{number:02}-{name}": _compose(name, changes[name], words, config.init)
        for number, name in enumerate(changes, start=1)
    }


def _compose(name: str, changes: Mapping[str, Any], words: Sequence[str], init: Any) -> DictConfig:
    flat = flatten(changes)
    for key in {str(read(word).key_or_group) for word in split_config_dir(words)[0]} & flat.keys():
        raise ConfigError(f"{key} is said by stages, so a word for all of them says nothing", got=f"{key}=...",
                          allowed=f"stages.{name}.{key} of each stage", remedy=f"stages.{name}.{key}=...")  # fmt: skip
    with told_of(name):
        stage = compose_config([*words, *map(_word, flat.items())])
    stage.stages, stage.init = {}, init  # as the whole run pinned it, which its words do not
    return stage


def _word(change: tuple[str, Any]) -> str:
    key, value = change
    is_plain = isinstance(value, str) and re.fullmatch(r"[\w./:-]+", value)
    text = value if is_plain else json.dumps(value)
    return f"{key}={text}" if is_group(key) else f"++{key}={text}"


def check_handover(stages: Stages) -> None:
    """Builds every stage without memory and refuses weights that the next one cannot take, and what a stage would
    refuse only when its turn comes. Raises ConfigError."""
    from vlm_train import build, origins

    previous: tuple[str, build.Parts] | None = None
    for name, config in stages.items():
        with told_of(name):
            parts = build.skeleton(config)
            build.evaluators(parts)
            if previous is not None:
                before, whose = previous[1], f"stage {previous[0]}"
                origins.check_same_tokenizer(config, before.config)
                weights = {"model": before.model.state_dict(), "objective": before.objective.state_dict()}
                origins.start(parts, weights, whose=whose)
        previous = name, parts


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """What is refused inside is told of the stage `name`."""
    try:
        yield
    except ConfigError as error:
        own = re.sub(rf"\A{STAGE}\d+-", "", name)
        remedy = re.sub(r"\A(?!run\.|stages\.)(?=\w+(\.\w+)+=)", f"stages.{own}.", error.remedy or "") or None
        raise ConfigError(f"stage {name}: {error.what}", got=error.got, allowed=error.allowed, remedy=remedy) from error


def in_turn(whole: DictConfig, stages: Stages) -> Iterator[tuple[DictConfig, RunDirectory]]:
    """Every stage with its run, in order. One is asked for when those before it are finished: it starts from their
    weights."""
    from vlm_train.cli.runs import choose_run

    before: Path | None = None
    for name, stage in stages.items():
        place(stage, whole, name, before)
        own, _ = choose_run(stage)
        stage.run.id = f"{whole.run.id}-{name}"
        yield stage, own
        before = own.path


def place(stage: DictConfig, whole: DictConfig, name: str, before: Path | None) -> None:
    """Says in the config of a stage where it lies and, for all but the first, whose weights it starts from."""
    from vlm_train.cli.trained import pinned

    stage.run.dir, stage.run.resume = str(Path(whole.run.dir) / name), "auto"
    stage.init = whole.init if before is None else pinned(str(before))
