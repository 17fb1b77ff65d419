"""Runs that another run comes from: the one whose weights it starts with, and the one that teaches it.

Either lends its tokenizer too: under another one, every id would mean another text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.engine import checkpoints, states
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError
from vlm_train.models import adapt, lora
from vlm_train.schema import WHOLE, by_part, plain, read_config
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
    starts = sources(config)
    if "text" in starts or WHOLE in starts:
        return run_of(starts.get("text") or starts[WHOLE])
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


def sources(config: Any) -> dict[str, Path]:
    """The checkpoints that `init` names, by the part of the model that starts from them, or `WHOLE`.

    Raises:
        ConfigError: one is gone, or its content is another.
    """
    return {part: start_checkpoint(init) for part, init in by_part(config.get("init")).items()}


def start_as_told(parts: Any) -> list[str]:
    """Fills a model as `init` says; see `start` and `start_part`.

    Returns:
        Towers of the model that the weights do not have, where they are to fill all of it.

    Raises:
        ConfigError: weights that do not fit.
    """
    new: list[str] = []
    for part, checkpoint in sources(parts.config).items():
        weights = trained_weights(checkpoint)
        if part == WHOLE:
            new = start(parts, weights, whose=str(checkpoint))
        else:
            start_part(parts.model, part, weights["model"], whose=str(checkpoint))
    return new


def start_part(model: nn.Module, part: str, state: Mapping[str, Tensor], *, whose: str) -> None:
    """Fills one part of a model with the part of that name of another; all other parts keep their first values.

    Raises:
        ConfigError: either has no such part, or they differ otherwise than `start` allows.
    """
    given = _under(state, f"{part}.")
    names = {name for name, _ in model.named_modules() if name}
    if part not in names or not given:
        has = {name.partition(".")[0] for name in (names if part not in names else state)}
        raise ConfigError(f"{'this model' if part not in names else whose} has no part {part}", got=f"init.{part}",
                          allowed=", ".join(sorted(has)), remedy="init={vision: RUN}")  # fmt: skip
    module = model.get_submodule(part)
    adapt.load_weights(module, lora.fitted(given, module.state_dict()), whose=f"{part} of {whose}")


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


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
