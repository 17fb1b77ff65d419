"""`vlm-train evaluate`: measure a trained run, with its own evaluation or with another one.

A run's records hold what its own config asks for, so only a plain `evaluate run=RUN` (newest checkpoint, nothing
overridden) writes there. Anything else is an experiment of its own: it is printed, and written where `out=` says.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vlm_train.cli.arguments import parse
from vlm_train.cli.measure import Job, start
from vlm_train.cli.options import count, out_file
from vlm_train.cli.paths import conf_dir, groups
from vlm_train.cli.trained import CHECKPOINT, DEVICE, RUN, choose_checkpoint, choose_device, open_run
from vlm_train.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from vlm_train.engine.rundir import RunDirectory


USAGE = """usage: vlm-train evaluate run=RUN [checkpoint=PATH] [out=FILE] [device=NAME] [devices=N] [key=value ...]

  vlm-train evaluate run=runs/quickstart/latest                      and bring its records and report up to date
  vlm-train evaluate run=runs/quickstart/latest evaluation=suite data.val.shards=other/val out=other.json

  run=RUN            {run}
  checkpoint=PATH    {checkpoint}
  out=FILE           JSON; the run's own records stay as they are
  device=NAME        {device}
  devices=N          ranks that share the work; never changes the result
  evaluation=CHOICE  {choices}
  evaluation.KEY= data.val.KEY= data.classes=   what else may differ from the run's config.yaml"""

KEYS = {"run": "RUN", "checkpoint": "PATH", "out": "FILE", "device": "NAME", "devices": "N"}
OVERRIDABLE = ("evaluation", "data.val", "data.classes")


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        choices = ", ".join(groups().get("evaluation", []))
        print(USAGE.format(run=RUN, checkpoint=CHECKPOINT, device=DEVICE, choices=choices))
        return 0
    arguments = parse(words, KEYS, verb="evaluate", rest=True)
    run = open_run(arguments.required("run", example="run=runs/quickstart/latest"))
    out = arguments.optional("out", out_file)

    from vlm_train.engine import checkpoints

    config = override(run, arguments.overrides)
    if not config.evaluation.evaluators:
        raise ConfigError("there is nothing to measure: evaluation=none", remedy="add evaluation=retrieval")
    checkpoint = choose_checkpoint(run, arguments.optional("checkpoint"))
    device = choose_device(arguments.optional("device"))
    num_ranks = arguments.optional("devices", count(), default=1)
    _check_ranks(num_ranks, device)
    newest = checkpoints.committed(run.checkpoints)[-1:]
    is_own = not arguments.overrides and out is None and [checkpoint.resolve()] == [path.resolve() for path in newest]
    job = Job(
        run=str(run.path),
        checkpoint=str(checkpoint),
        device=str(device),
        out=None if out is None else str(out),
        is_own=is_own,
        overrides=arguments.overrides,
    )
    with ExitStack() as stack:
        if is_own:
            _hold(run, stack)
        return start(job, config, num_ranks)


def _check_ranks(num_ranks: int, device: torch.device) -> None:
    """Refuses more ranks than GPUs or cores, and several ranks on one GPU."""
    import torch

    is_cpu = device.type == "cpu"
    most = max(2, os.cpu_count() or 1) if is_cpu else torch.cuda.device_count()
    if num_ranks == 1 or (num_ranks <= most and device.index is None):
        return
    what = "cores" if is_cpu else "GPUs"
    raise ConfigError("several ranks take a core or a GPU each",
                      got=f"devices={num_ranks} device={device}, {most} {what}",
                      allowed=f"devices from 1 to {most}, with device={device.type}",
                      remedy=f"devices={most} device={device.type}")  # fmt: skip


def override(run: RunDirectory, words: list[str]) -> DictConfig:
    """The run's config with another evaluation. Raises ConfigError for a word that is about something else."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from vlm_train.cli.compose import resolve
    from vlm_train.schema import Config, check, load_config

    try:
        config = OmegaConf.merge(OmegaConf.structured(Config), load_config(run.config))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{run.config} is not the config of this release",
            got=str(error).splitlines()[0],
            allowed="the config as vlm-train wrote it",
            remedy="restore it, or train again",
        ) from error
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    parsed = sorted(map(_parsed, words), key=lambda item: item[0] != "evaluation")  # a choice first, its keys after it
    for key, value, is_new, word in parsed:
        try:
            node = _choice(value) if key == "evaluation" else value
            OmegaConf.update(config, key, node, merge=False, force_add=is_new)
        except ConfigError:
            raise
        except Exception as error:  # as in `compose`
            raise _not_taken(config, key, word, error) from error
    resolve(config)
    check(config)
    return config


def _parsed(word: str) -> tuple[str, Any, bool, str]:
    """(key, value, whether it is a new key, the word itself)."""
    from vlm_train.cli.overrides import read

    found = read(word)
    key = str(found.key_or_group)
    if found.is_delete():
        raise ConfigError("`evaluate` takes nothing out of a config", got=word, allowed="key=value",
                          remedy=f"{key}=VALUE")  # fmt: skip
    if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in OVERRIDABLE):
        raise ConfigError(
            f"`evaluate` cannot change {key}: it belongs to how the run was trained",
            got=word,
            allowed="evaluation=CHOICE, evaluation.KEY=, data.val.KEY=, data.classes=",
            remedy=f"vlm-train train ... {word} makes another run",
        )
    return key, found.value(), found.is_add(), word


def _choice(name: Any) -> Any:
    """The node of conf/evaluation/NAME.yaml over the defaults of its schema."""
    from omegaconf import OmegaConf

    from vlm_train.schema import EvaluationConfig

    path = conf_dir() / "evaluation" / f"{name}.yaml"
    if not path.is_file():
        known = groups().get("evaluation", [])
        close = nearest(str(name), known)
        raise ConfigError("no such choice in the group 'evaluation'", got=name, allowed=", ".join(known),
                          remedy=f"evaluation={close[0]}" if close else "vlm-train configs list")  # fmt: skip
    return OmegaConf.merge(OmegaConf.structured(EvaluationConfig), OmegaConf.load(path))


def _not_taken(config: DictConfig, key: str, word: str, error: Exception) -> ConfigError:
    from omegaconf import OmegaConf

    from vlm_train.schema import flatten

    if OmegaConf.select(config, key) is not None:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return ConfigError(f"{key} cannot take this value: {why}", got=word, allowed="a value of the type of this key",
                           remedy=f"vlm-train configs search {key}")  # fmt: skip
    known = [name for name in flatten(OmegaConf.to_container(config)) if name.startswith(OVERRIDABLE)]
    close = nearest(key, known)
    return ConfigError(f"no such key: {key}", got=word, allowed=", ".join(close or known),
                       remedy=f"{close[0]}=..." if close else f"+{word} if the evaluator takes it")  # fmt: skip


def _hold(run: RunDirectory, stack: ExitStack) -> None:
    """Takes the run's lock; a run in training writes its records itself."""
    from vlm_train.cli.runs import locked

    try:
        stack.enter_context(locked(run))
    except ConfigError as error:
        remedy = "wait for it, or add out=FILE: the run's own records then stay as they are"
        raise ConfigError(error.what, got=error.got, remedy=remedy) from error
