"""Where the time of real runs goes: kills, restarts and slowness, each in its account. The long form is
scripts/proof/ledger.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import _runs
import _slowness
import pytest

from vlm_train.engine.ledger import Totals, lives_of, totals

TWO = ("trainer.devices=2", "strategy=ddp")
NUM_STEPS = 24


def words(data: Path, run: Path, *extra: str) -> list[str]:
    settings = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every_steps=5", "checkpoint.asynchronous=false")
    return _runs.train_words(data, *settings, f"run.dir={run}", *extra)


def accounts(run: Path) -> Totals:
    found = totals(lives_of(run / "time.jsonl"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The run on two ranks in which nothing is slow, and which nobody kills: the twin of all others."""
    folder = tmp_path_factory.mktemp("plain")
    output = _slowness.call(folder, "none", words(scenes, folder / "run", *TWO))
    (folder / "output.txt").write_text(output)
    return folder / "run"


@pytest.mark.slow
def test_a_run_says_where_its_time_went(plain: Path) -> None:
    found, output = accounts(plain), (plain.parent / "output.txt").read_text()
    assert f"goodput {found.goodput:.1%}" in output
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.01)
    for name in ("startup", "data_wait", "compute", "optimizer", "communication", "validation", "checkpoint"):
        assert found.seconds[name] > 0, name
    assert found.seconds["replay"] == found.seconds["idle"] == 0
    page = (plain / "report.html").read_text()
    assert "<h2>Time</h2>" in page and "By rank" in page
    assert totals(lives_of(plain / "time-rank-1.jsonl")) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "account", "seconds"),
    [
        ("loader", "data_wait", NUM_STEPS * _slowness.LATE_SECONDS),
        ("disk", "checkpoint", 5 * _slowness.FLUSH_SECONDS),
        ("rank", "communication", NUM_STEPS * _slowness.LATE_SECONDS),
    ],
)
def test_what_is_slow_shows_in_its_account(
    tmp_path: Path, scenes: Path, plain: Path, kind: str, account: str, seconds: float
) -> None:
    """At least nine tenths of what was slept; the run without stays far below, which is the control."""
    _slowness.call(tmp_path, kind, words(scenes, tmp_path / "run", *TWO))
    assert accounts(tmp_path / "run").seconds[account] >= 0.9 * seconds
    assert accounts(plain).seconds[account] < accounts(tmp_path / "run").seconds[account] - 0.5 * seconds
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["event"] == "hang"]  # slow is not dead


@pytest.mark.slow
def test_a_kill_costs_replay_and_the_break_is_idle(tmp_path: Path, scenes: Path, plain: Path) -> None:
    """Killed after step 8 of a run that saves each fifth: steps 6 to 8 come again."""
    run, began = tmp_path / "run", time.time()
    _runs.kill_after(tmp_path, words(scenes, run), run, 8)
    ended = time.time()
    time.sleep(3.0)
    _runs.call_anew(tmp_path, words(scenes, run))
    lives, found = lives_of(run / "time.jsonl"), accounts(run)
    assert [(row["life"], row["state"]) for row in lives] == [(1, "killed"), (2, "ended")]
    assert lives[0]["step"] >= 8
    assert lives[0]["began"] == pytest.approx(began, abs=2.0) and lives[0]["time"] <= ended
    assert found.seconds["replay"] > 0 and found.seconds["idle"] >= 3.0
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.01)
    assert found.goodput < 1 - found.seconds["idle"] / found.wall
    assert accounts(plain).seconds["replay"] == 0


@pytest.mark.slow
def test_a_stage_does_not_count_the_time_of_the_one_before(tmp_path: Path, scenes: Path) -> None:
    """Both train in one process."""
    stages = ("+stages.first.trainer.max_steps=6", "+stages.second.trainer.max_steps=6", "schedule.warmup_steps=1")
    began = time.time()
    command = [word for word in words(scenes, tmp_path / "run", *stages) if not word.startswith("trainer.max_steps")]
    _runs.call_anew(tmp_path, command)
    first, second = (lives_of(path)[-1] for path in sorted((tmp_path / "run").glob("stage-*/time.jsonl")))
    assert began - 2.0 < first["began"] < first["time"] <= second["began"] < second["time"]
