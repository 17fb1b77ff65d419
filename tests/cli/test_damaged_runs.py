"""Runs whose records are torn, whose processes are killed, or that never began: what is told, and that they go on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import _runs
import psutil
import pytest

from vlm_train.engine.rundir import RunDirectory, read_lines


def words(data: Path, run: Path, *extra: str, max_steps: int = 24) -> list[str]:
    return _runs.train_words(
        data, f"trainer.max_steps={max_steps}", "checkpoint.every_steps=4", f"run.dir={run}", *extra
    )


def failures(run: Path) -> list[str]:
    return [row["error"] for row in read_lines(run / "events.jsonl", "event") if row["event"] == "failed"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A run that was killed behind the checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("begun")
    _runs.kill_after(folder, words(scenes, folder / "run"), folder / "run", 5)
    return folder / "run"


@pytest.mark.parametrize("name", ["events.jsonl", "time.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("torn", ['{"step": 5, "torn', "\0\0\0"])
def test_a_record_that_a_power_cut_has_torn_is_left_out(
    begun: Path, tmp_path: Path, scenes: Path, name: str, torn: str
) -> None:
    run = shutil.copytree(begun, tmp_path / "run", symlinks=True)
    with open(run / name, "a") as file:
        file.write(torn)
    told = _runs.call(tmp_path, words(scenes, run))
    assert "resuming" in told
    assert [row["step"] for row in _runs.rows(run)] == list(range(1, 25))
    assert torn.encode() not in (run / name).read_bytes()
    assert RunDirectory(run).is_finished()


def test_a_ledger_that_nobody_can_read_does_not_end_a_run(begun: Path, tmp_path: Path, scenes: Path) -> None:
    run = shutil.copytree(begun, tmp_path / "run", symlinks=True)
    (run / "time.jsonl").write_bytes(b'{"life": 1}\n\xff\n')
    told = _runs.call(tmp_path, words(scenes, run))
    assert "time.jsonl line 1 is not a record" in told and RunDirectory(run).is_finished()
    assert (run / "time.damaged").read_bytes() == b'{"life": 1}\n\xff\n'
    (run / "events.jsonl").write_bytes(b"\xff\n")  # the twin: what a run is known by is not thrown away
    assert "events.jsonl line 1 is not JSON" in _runs.call(tmp_path, words(scenes, run), expect=1)


def test_a_checkpoint_may_lie_elsewhere(begun: Path, tmp_path: Path, scenes: Path) -> None:
    run = shutil.copytree(begun, tmp_path / "run", symlinks=True)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    elsewhere = newest.rename(tmp_path / "larger-disk")
    newest.symlink_to(elsewhere)
    assert f"after step {int(newest.name[5:])}" in _runs.call(tmp_path, words(scenes, run))
    assert RunDirectory(run).is_finished()


def test_a_run_that_failed_before_its_first_step_has_learned_nothing(tmp_path: Path, scenes: Path) -> None:
    """Its name can be had; the twin has trained a step."""
    run = tmp_path / "run"
    told = _runs.call(tmp_path, words(scenes, run, "model.text.num_heads=3"), expect=2)
    (error,) = failures(run)
    assert error in told
    _runs.call(tmp_path, words(scenes, run))
    assert "trained with another config" in _runs.call(tmp_path, words(scenes, run, "seed=5"), expect=2)


def test_a_run_keeps_the_name_that_it_was_given(tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    for name in ("run.id=mine", "run.resume=auto"):
        _runs.call(tmp_path, words(scenes, run, name))
        assert "  id: mine\n" in (run / "config.yaml").read_text()
    assert "another name" in _runs.call(tmp_path, words(scenes, run, "run.id=yours"), expect=2)
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    (copy / "config.yaml").write_text((run / "config.yaml").read_text().replace("  id: mine\n", "  id: run\n"))
    _runs.call(tmp_path, words(scenes, copy))
    assert (copy / "checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "reader"])
def test_a_process_that_is_killed_is_named(tmp_path: Path, scenes: Path, who: str) -> None:
    run = tmp_path / "run"
    extra = ("trainer.devices=2", "strategy=ddp") if who == "rank" else ("data.num_workers=1",)
    log = tmp_path / "log.txt"
    log.touch()
    process = _runs.begin(tmp_path, words(scenes, run, *extra, max_steps=2000), log)
    while _runs.last_step(run) < 3:
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    children = [
        child for child in psutil.Process(process.pid).children() if "watchdog" not in " ".join(child.cmdline())
    ]
    chosen = [child for child in children if who == "reader" or child.environ().get("RANK") == "1"]
    os.kill(chosen[-1].pid, signal.SIGKILL)
    process.join(120)
    told = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in told
    wanted = "rank 1 was ended by SIGKILL" if who == "rank" else f"reads data was killed: process {chosen[-1].pid}"
    assert wanted in told.rpartition("error:")[2]
    assert any(wanted in error or "DataLoader worker" in error for error in failures(run))
