"""A sweep on disk: base.yaml, the config of its first run, and sweep.json, what each run was given and what it scored.

sweep.json is written anew, beside its name and renamed, whenever a run begins or ends. A search knows of its trials
what stands there and nothing else, so none is lost by a kill and none counts twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_train.engine.rundir import write_atomic
from vlm_train.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.cli.sweep_values import Swept

BASE, TABLE = "base.yaml", "sweep.json"


@dataclass(slots=True)
class Row:
    """One run. `run`: the name of its folder; `state`: running (also after a kill), interrupted, finished or failed;
    `metrics`: the numbers of its last step, and its scores as EVALUATOR.GROUP.NAME."""

    run: str
    swept: Swept
    state: str = "running"
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class SweepFolder:
    """The files of one sweep.

    Args:
        path: its folder.
        sweeps: what is swept over, as it was typed.
        is_search: whether its runs are chosen one by one.
    """

    def __init__(self, path: Path, sweeps: Sequence[str], *, is_search: bool) -> None:
        self.path, self.config, self.table = path, path / BASE, path / TABLE
        self.sweeps, self.is_search = list(sweeps), is_search
        self.is_finished = False
        self.rows: list[Row] = []

    def create(self) -> None:
        """Makes the folder."""
        self.path.mkdir(parents=True, exist_ok=True)

    def read(self) -> None:
        """The rows that are there. Raises ConfigError where they are of another sweep, CheckpointError where nobody
        can read them."""
        if not self.table.is_file():
            return
        try:
            told = json.loads(self.table.read_text(encoding="utf-8"))
            is_finished, rows = bool(told["finished"]), [Row(**row) for row in told["runs"]]
            before = list(told["sweep"]), bool(told["search"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.table} is damaged: {error}",
                                  remedy="restore it, or start another sweep: run.id=NAME") from error  # fmt: skip
        if before != (self.sweeps, self.is_search):
            raise ConfigError(f"{self.path} is another sweep", got=_said(self.sweeps, self.is_search),
                              allowed=_said(*before),
                              remedy="restore these words, or give the new sweep its own run.id")  # fmt: skip
        self.is_finished, self.rows = is_finished, rows

    def write(self) -> None:
        """Writes what `read` reads."""
        runs = [asdict(row) for row in self.rows]
        told = {"sweep": self.sweeps, "search": self.is_search, "finished": self.is_finished, "runs": runs}
        write_atomic(self.table, json.dumps(told, indent=1) + "\n")

    def begin(self, config: DictConfig) -> None:
        """What a sweep is known by, once it has a folder that nobody else holds."""
        from omegaconf import OmegaConf

        if not self.config.is_file():
            write_atomic(self.config, OmegaConf.to_yaml(config))
        self.write()


def choose_sweep(config: DictConfig, sweeps: Sequence[str], *, is_search: bool) -> SweepFolder:
    """The sweep that a command means, as `runs.choose_run` does with runs: one that is named, or the experiment's
    newest if that is unfinished and the same, or a new one. `config`: of its first run. Raises ConfigError."""
    from vlm_train.cli.sweeps import folder_of

    named = config.run.dir is not None or config.run.id is not None
    if not named and (latest := _newest(config, sweeps, is_search=is_search)) is not None:
        return latest
    sweep = SweepFolder(folder_of(config), sweeps, is_search=is_search)
    if sweep.config.is_file() and config.run.resume == "never":
        raise ConfigError(f"{sweep.path} exists already", got="run.resume=never", allowed="a new run.id or run.dir",
                          remedy="leave run.resume at auto to go on with it")  # fmt: skip
    check_same(config, sweep)
    return sweep


def check_same(config: DictConfig, sweep: SweepFolder) -> None:
    """Refuses a command that says something else than the one that began the sweep. Raises ConfigError."""
    from vlm_train.cli.runs import refuse_other_config

    sweep.read()
    refuse_other_config(config, sweep)


def _newest(config: DictConfig, sweeps: Sequence[str], *, is_search: bool) -> SweepFolder | None:
    """The experiment's newest sweep, if that is unfinished and the same."""
    there = list((Path("runs") / config.run.experiment).glob(f"*/{BASE}"))
    if config.run.resume != "auto" or not there:
        return None
    newest = max(there, key=lambda path: path.stat().st_mtime).parent
    sweep = SweepFolder(newest, sweeps, is_search=is_search)
    try:
        check_same(config, sweep)
    except ConfigError:
        return None
    return None if sweep.is_finished else sweep


def _said(sweeps: Sequence[str], is_search: bool) -> str:
    return " ".join([*(f"--sweep {text}" for text in sweeps), "with --trials" if is_search else "without --trials"])
