"""The run that words of `vlm-train train` mean: composed, and refused where it could not be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_train.errors import ConfigError, VlmError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.cli.stages import Stages


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """The config of a run, those of its stages, and the words of train that say the same."""

    config: DictConfig
    stages: Stages
    words: list[str]


def planned(words: Sequence[str]) -> PlannedRun:
    """The run that words describe; all that can be refused before there is a run has been. Raises ConfigError."""
    from vlm_train.cli.compose import compose_config
    from vlm_train.cli.stages import check_handover, compose_stages, told_of
    from vlm_train.cli.trained import pinned

    config = compose_config(words)
    config.init = pinned(config.init)
    stages = compose_stages(config, words)
    if not stages:
        _try_parts(config)
    for name, stage in stages.items():
        with told_of(name):
            _try_parts(stage)
    check_handover(stages)
    return PlannedRun(config, stages, list(words))


def refuse_nodes(config: DictConfig) -> None:
    """Raises ConfigError where a run asks for more machines than this one."""
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            "`vlm-train train` starts ranks on this machine only", got=f"trainer.num_nodes={config.trainer.num_nodes}",
            allowed="1", remedy="vlm-train submit, or trainer.num_nodes=1",
        )  # fmt: skip


def _try_parts(config: Any) -> None:
    """Makes what needs neither data nor tokenizer, for its refusals: before a run is there, and not after indexing."""
    from vlm_train import build
    from vlm_train.engine.micro_batches import Budgets
    from vlm_train.models import attention

    attention.require(config.attention.name)
    for name in ("objective", "optim", "schedule"):
        try:
            made = build.make(config[name])
        except VlmError:
            raise
        except Exception as error:  # a value that the class did not expect
            raise ConfigError(f"{name} cannot be built: {error}", got={key: config[name][key] for key in config[name]},
                              allowed=f"the keys and values of {config[name]['_target_']}",
                              remedy=f"vlm-train configs show {name}/CHOICE") from error  # fmt: skip
        if name == "objective":
            Budgets.of(config.trainer).check_objective(made)
