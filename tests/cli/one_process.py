"""Sweeps whose runs are trained in the process of the sweep, which tests what a sweep keeps without the time that a
process takes to start; test_sweep_runs.py has runs in processes of their own, too."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _runs


def launch_here(arguments: Sequence[str], num_ranks: int) -> int:
    """In place of `launcher.launch`."""
    from vlm_train import training
    from vlm_train.cli.outcome import tell

    try:
        training.train(Path(arguments[0]), Path(arguments[1]) if len(arguments) == 2 else None)
    except Exception as error:
        return tell(error)
    return 0


def begin(folder: Path, words: Sequence[str], *, ranks_apart: bool = False) -> Any:
    """Starts `vlm-train WORDS` as `_runs.begin` does; what it says is in log.txt. `ranks_apart`: as users start it."""
    (folder / "log.txt").write_text("")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm_train.training", "vlm_train.cli.main", "optuna"])
    process = context.Process(target=_command, args=(str(folder), list(words), ranks_apart))
    process.start()
    return process


def call(folder: Path, words: Sequence[str], expect: int = 0) -> str:
    """Runs it to its end and returns all that was said."""
    process = begin(folder, words)
    process.join(200)
    said = (folder / "log.txt").read_text()
    assert process.exitcode == expect, said
    return said


def signal_after(process: Any, sweep: Path, number: int, step: int, signum: int) -> int:
    """Sends a signal once run `number` of a sweep tells `step`; returns the exit code."""
    deadline = time.monotonic() + 200
    while not any(_runs.last_step(run) >= step for run in sweep.glob(f"{number:02}-*")) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.is_alive(), (sweep.parent / "log.txt").read_text()
    os.kill(process.pid, signum)
    process.join(60)
    return int(process.exitcode)


def runs_of(sweep: Path) -> list[dict[str, Any]]:
    """The rows of sweep.json."""
    rows: list[dict[str, Any]] = json.loads((sweep / "sweep.json").read_text())["runs"]
    return rows


def _command(folder: str, words: list[str], ranks_apart: bool) -> None:
    from vlm_train.cli import launcher

    if not ranks_apart:
        launcher.launch = launch_here  # type: ignore[assignment]
    _runs._command(folder, words, _runs._environment(), str(Path(folder) / "log.txt"))
