"""Runs that another run comes from: the one whose weights it starts with, and the one that teaches it.

Either lends its tokenizer too: under another one, every id would mean another text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.engine import checkpoints, states
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError
from vlm_train.models import adapt, lora
from vlm_train.schema import plain, read_config
from vlm_train.types import Tokenizer


def tokenizer(config: Any) -> Tokenizer | None:
    """The tokenizer of the run that this one starts from, or else of its teacher; None where there is neither.

    Raises:
        ConfigError: `model.tokenizer` asks for another one, or the run is not there.
    """
    lender = _lender(config)
    if lender is None:
        return None
    check_same_tokenizer(config, read_config(lender.path))
    return load_tokenizer(str(lender.tokenizer), context_length=config.model.tokenizer.get("context_length"))


def _lender(config: Any) -> RunDirectory | None:
    if config.init:
        return run_of(start_checkpoint(config.init))
    nodes = [config.objective, *(config.objective.get("parts") or {}).values()]
    teachers = [node.teacher for node in nodes if node.get("teacher")]
    return RunDirectory(Path(teachers[0])) if teachers else None


def check_same_tokenizer(config: Any, before: Any) -> None:
    """Refuses another tokenizer than `before` had, but for its context length. Raises ConfigError."""
    ours, theirs = ({**plain(each.model.tokenizer), "context_length": 0} for each in (config, before))
    if theirs != ours:
        raise ConfigError("the run that this one comes from has another tokenizer", got=f"model.tokenizer: {ours}",
                          allowed=f"{theirs}, with any context_length", remedy="set model.tokenizer so")  # fmt: skip


def trained_weights(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """`model` and `objective`: name -> tensor; the model's averaged weights where there are any."""
    state = states.read_weights(checkpoint)
    prefix = "averaged_model." if any(key.startswith("averaged_model.") for key in state) else "model."
    return {"model": _under(state, prefix), "objective": _under(state, "objective.")}


def start_checkpoint(init: str) -> Path:
    """The checkpoint that a pinned `init` names, PATH@IDENTITY.

    Raises:
        ConfigError: it is gone, or its content is another.
    """
    place, _, pinned = init.rpartition("@")
    path = Path(place)
    found = checkpoints.identity(path) if (path / "manifest.json").is_file() else "nothing"
    if found != pinned:
        raise ConfigError("the weights to start from are not there any more", got=f"{found} at {place}",
                          allowed=pinned, remedy="restore it, or start another run: run.id=NAME")  # fmt: skip
    return path


def start(parts: Any, weights: Mapping[str, Mapping[str, Any]], *, whose: str) -> list[str]:
    """Fills model and objective with `trained_weights`, positions resized and adapters merged where `lora.fitted` says
    so; parts without memory are only compared.

    Returns:
        Towers that these weights do not have. Where there are any the objective keeps its first values, too: it binds
        what was not there.

    Raises:
        ConfigError: anything else that differs, by name.
    """
    adapt.load_weights(parts.model, lora.fitted(weights["model"], parts.model.state_dict()), whose=whose)
    new = adapt.new_towers(parts.model, weights["model"])
    if not new:
        adapt.load_weights(parts.objective, weights["objective"], whose=whose)
    return new


def run_of(checkpoint: Path) -> RunDirectory:
    """The run that a committed checkpoint belongs to."""
    return RunDirectory(checkpoint.resolve().parent.parent)


def _under(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
