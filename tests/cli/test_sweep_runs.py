"""Sweeps that really train: one after another, killed, interrupted, failing, and what they leave."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import _runs
import one_process
import pytest

SEARCH = (
    "--sweep", "optim.lr=log(1e-4,1e-1)", "--sweep", "optim.weight_decay=0,0.1", "--minimize", "loss",
)  # fmt: skip


def words(data: Path, *extra: str) -> list[str]:
    steps = ("trainer.max_steps=6", "schedule.warmup_steps=1", "checkpoint.every_steps=2", "trainer.accelerator=cpu")
    return [word for word in _runs.train_words(data) if "warmup" not in word] + [*steps, *extra]


def events(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]


def learned(sweep: Path) -> list[dict[str, Any]]:
    """What stands in sweep.json but for what measures the machine."""
    rows = one_process.runs_of(sweep)
    for row in rows:
        row["metrics"] = {name: value for name, value in row["metrics"].items() if name not in _runs.MACHINE_COLUMNS}
    return rows


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on_where_the_sweep_was(tmp_path: Path, scenes: Path) -> None:
    """A run is, to the byte, the run that its words are without a sweep; the twin is the other one."""
    steps = ("trainer.max_steps=20", "checkpoint.every_steps=20")
    command, sweep = words(scenes, "run.dir=sweep", "--sweep", "seed=0,1", *steps), tmp_path / "sweep"
    process = one_process.begin(tmp_path, command, ranks_apart=True)
    assert one_process.signal_after(process, sweep, 1, 5, signal.SIGINT) == 130
    assert "next: the same command goes on" in (tmp_path / "log.txt").read_text()
    assert [row["state"] for row in one_process.runs_of(sweep)] == ["finished", "interrupted"]
    one_process.call(tmp_path, command)
    assert [row["state"] for row in one_process.runs_of(sweep)] == ["finished", "finished"]
    assert events(sweep / "00-seed-0").count("start") == 1 and "resume" not in events(sweep / "00-seed-0")
    assert events(sweep / "01-seed-1").count("resume") == 1
    _runs.call(tmp_path, words(scenes, "run.dir=alone", "seed=1", *steps))
    assert _runs.learned(sweep / "01-seed-1") == _runs.learned(tmp_path / "alone") != _runs.learned(sweep / "00-seed-0")


def test_a_killed_search_is_the_one_that_nobody_killed(tmp_path: Path, scenes: Path) -> None:
    """SIGKILL in the second of three runs: each is told once, with the same suggestions and scores. The twin has
    another seed."""
    command, sweep = words(scenes, "run.dir=killed", *SEARCH, "--trials=3"), tmp_path / "killed"
    process = one_process.begin(tmp_path, command)
    assert one_process.signal_after(process, sweep, 1, 3, signal.SIGKILL) == -signal.SIGKILL
    assert [row["state"] for row in one_process.runs_of(sweep)] == ["finished", "running"]
    one_process.call(tmp_path, command)
    one_process.call(tmp_path, words(scenes, "run.dir=untouched", *SEARCH, "--trials=3"))
    one_process.call(tmp_path, words(scenes, "run.dir=other", "seed=1", *SEARCH, "--trials=1"))
    assert learned(sweep) == learned(tmp_path / "untouched")
    assert learned(sweep)[0]["swept"] != learned(tmp_path / "other")[0]["swept"]
    (first,) = sweep.glob("00-*")
    assert events(first).count("start") == 1 and "resume" not in events(first)
    assert len(os.listdir(sweep)) == 6  # three runs, base.yaml, sweep.json, .lock


def test_a_failing_run_does_not_end_the_others_and_is_tried_again(tmp_path: Path, scenes: Path) -> None:
    command = words(scenes, "run.dir=sweep", "--sweep", "data.selection=nowhere,null", "--minimize", "loss")
    said = one_process.call(tmp_path, command, expect=1)
    assert "failed: sweep/00-selection-nowhere" in said and "best: sweep/01-selection-null" in said
    assert [row["state"] for row in one_process.runs_of(tmp_path / "sweep")] == ["failed", "finished"]
    selected = [str(scenes / "train"), "--where", "width > 0", "--out", "nowhere"]
    _runs.call(tmp_path, ["data", "select", *selected])
    one_process.call(tmp_path, command)
    assert [row["state"] for row in one_process.runs_of(tmp_path / "sweep")] == ["finished", "finished"]
    assert events(tmp_path / "sweep" / "01-selection-null").count("start") == 1


def test_a_search_counts_a_failed_run_and_goes_on_further(tmp_path: Path, scenes: Path) -> None:
    """More trials continue a search that has a name; what failed stays told. Of four combinations two fail."""
    swept = ("--sweep", "data.selection=nowhere,null", "--sweep", "seed=int(0,1)", "--minimize", "loss")
    one_process.call(tmp_path, words(scenes, "run.dir=sweep", *swept, "--trials", "3"), expect=1)
    before = learned(tmp_path / "sweep")
    assert {row["state"] for row in before} == {"failed", "finished"}
    one_process.call(tmp_path, words(scenes, "run.dir=sweep", *swept, "--trials", "4"), expect=1)
    after = learned(tmp_path / "sweep")
    assert after[:3] == before and sorted(row["state"] for row in after) == ["failed", "failed", "finished", "finished"]


def test_an_unknown_goal_ends_the_sweep_after_one_run_which_is_kept(tmp_path: Path, scenes: Path) -> None:
    command = words(scenes, "--sweep", "seed=0,1")  # no name: the newest sweep, unfinished and the same, goes on
    said = one_process.call(tmp_path, [*command, "--maximize", "retrieval.text_to_image.R@2"], expect=2)
    assert "retrieval.text_to_image.R@1" in said
    (sweep,) = (tmp_path / "runs" / "default").iterdir()
    assert [row["state"] for row in one_process.runs_of(sweep)] == ["finished"]
    one_process.call(tmp_path, [*command, "--maximize", "retrieval.text_to_image.R@1"])
    assert list((tmp_path / "runs" / "default").iterdir()) == [sweep]
    assert events(sweep / "00-seed-0").count("start") == 1
    one_process.call(tmp_path, command)  # the twin: what is finished is left alone
    assert len(list((tmp_path / "runs" / "default").iterdir())) == 2


def test_another_recipe_is_another_sweep(tmp_path: Path, scenes: Path) -> None:
    command = words(scenes, "run.dir=sweep", "--sweep", "seed=0,1")
    one_process.call(tmp_path, command)
    assert "schedule.warmup_steps: 1 -> 2" in one_process.call(
        tmp_path, [*command, "schedule.warmup_steps=2"], expect=2
    )
    assert "another sweep" in one_process.call(tmp_path, [*command[:-1], "seed=0,2"], expect=2)
    assert "exists already" in one_process.call(tmp_path, [*command, "run.resume=never"], expect=2)
    before = learned(tmp_path / "sweep")
    one_process.call(tmp_path, [*command, "data.num_workers=0"])
    assert learned(tmp_path / "sweep") == before
    assert "no sweep" in one_process.call(tmp_path, words(scenes, "run.dir=sweep/00-seed-0", "--sweep", "seed=0,1"), 2)


def test_stages_are_swept_over_too(tmp_path: Path, scenes: Path) -> None:
    stages = ("++stages.one.optim.lr=0.01", "++stages.two.optim.lr=0.02")
    one_process.call(tmp_path, words(scenes, "run.dir=sweep", *stages, "--sweep", "seed=0,1", "--minimize", "loss"))
    for number, row in enumerate(one_process.runs_of(tmp_path / "sweep")):
        last = _runs.rows(tmp_path / "sweep" / f"0{number}-seed-{number}" / "stage-02-two")[-1]
        assert row["metrics"]["loss"] == last["loss"] and row["state"] == "finished"
