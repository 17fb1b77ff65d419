"""`vlm-train sync`, and a run with logger=wandb offline that is killed and goes on: one W&B run, each step once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlm_train.cli.main import main

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
import _runs
from test_wandb import history


def test_a_killed_run_is_one_offline_run(scenes: Path, tmp_path: Path) -> None:
    options = ("trainer.max_steps=12", "checkpoint.every_steps=4", "logger=wandb", "logger.mode=offline", "run.dir=run")
    words = _runs.train_words(scenes, *options)
    run = tmp_path / "run"
    _runs.kill_after(tmp_path, words, run, 6)
    assert not list(run.glob("wandb/*"))  # W&B cannot join the files of two processes
    _runs.call(tmp_path, words)
    rows = [row for row in history(run) if "loss" in row]
    assert [row["_step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == [row["loss"] for row in _runs.rows(run)]
    _runs.call(tmp_path, ["sync", "run", "--mode", "offline"])
    assert len([row for row in history(run) if "loss" in row]) == 12


def test_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync"]) == 0 and "usage" in capsys.readouterr().out
    assert main(["sync", str(tmp_path)]) == 2 and "config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("run: {id: x}\nlogger: {name: none}\n")
    assert main(["sync", str(tmp_path)]) == 2 and "nothing to send" in capsys.readouterr().err
