"""What the runs of a sweep are, wherever they are trained: each is composed, named and placed here.

A sweep is a folder, a run of it a folder in that: NUMBER-KEY-VALUE. `vlm-train submit` makes an array of them,
`vlm-train train` trains one after another (`sweep_runs.py`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_train.errors import ConfigError
from vlm_train.locations import scrubbed

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.cli.planned import PlannedRun
    from vlm_train.cli.sweep_values import Swept


def planned_of(words: Sequence[str], swept: Swept) -> PlannedRun:
    """The run of these words and of the values that a sweep gives it, without a place yet. Raises ConfigError."""
    from vlm_train.cli.planned import planned
    from vlm_train.cli.sweep_values import in_words

    return planned([*words, *in_words(swept)])


def name_of(number: int, swept: Swept) -> str:
    """Of the folder of a run of a sweep."""
    values = "-".join(f"{key.split('.')[-1]}={scrubbed(text)}" for key, text in swept.items())
    return f"{number:02}-" + re.sub(r"[^\w.-]+", "-", values)[:60]


def place(run: PlannedRun, folder: Path, number: int, swept: Swept) -> None:
    """Says in the config of a sweep's run which one it is, and where in the sweep's folder it lies."""
    name, own = name_of(number, swept), run.config.run
    own.dir, own.id, own.resume = f"{folder}/{name}", f"{folder.name}-{name}", "auto"


def folder_of(config: DictConfig) -> Path:
    """Where a sweep lies whose runs have this config: where run.dir or run.id say, or else a new place. Raises
    ConfigError."""
    from vlm_train.cli.runs import choose_run

    own = copy.deepcopy(config)
    if own.run.resume not in ("auto", "never"):
        raise ConfigError("a sweep goes on by its own name", got=f"run.resume={own.run.resume}",
                          allowed="run.resume=auto, or never", remedy="run.dir=PATH of the sweep")  # fmt: skip
    named = own.run.dir is not None or own.run.id is not None
    own.run.resume = "auto" if named else "never"
    run, _ = choose_run(own)
    if run.config.is_file():
        raise ConfigError(f"{run.path} is one run and no sweep", got=f"run.dir={run.path}",
                          allowed="a name that is not taken, or a sweep's",
                          remedy=f"run.dir={run.path}-sweep")  # fmt: skip
    return run.path
