"""The ledger: every second once, in the right account, also those of a process that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlm_train
from vlm_train.distributed import collectives, waiting
from vlm_train.engine import heartbeat, ledger
from vlm_train.engine.callbacks.clock import Waits
from vlm_train.engine.heartbeat import ACCOUNTS, Heartbeat, page_of, read_beat, read_beats
from vlm_train.engine.ledger import STEP_ACCOUNTS, Ledger, book_the_end, columns, kept, lives_of, totals
from vlm_train.engine.rundir import RunDirectory, append_line

BORDERS = st.lists(st.tuples(st.sampled_from(ACCOUNTS), st.floats(0, 1e4)), max_size=30)


class Time:
    """A clock that the test moves; in place of the module `time` in the ledger."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


class Forgetful(Ledger):
    """The twin: a second that lies before a change to overhead is lost."""

    def switch(self, account: str, collective: bytes = b"") -> str:
        if account == "overhead":
            self._since = ledger.time.perf_counter()
        return super().switch(account, collective)


def booked(kind: type[Ledger], borders: list[tuple[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """(what the ledger has, what a sum over the borders says)."""
    clock, expected = Time(), dict.fromkeys(ACCOUNTS, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "time", clock)
        book = kind()
        account = "startup"
        for after, seconds in borders:
            clock.now += seconds
            expected[account] += seconds
            book.switch(after)
            account = after
    return book.seconds, expected


@given(BORDERS)
def test_every_second_is_booked_once(borders: list[tuple[str, float]]) -> None:
    found, expected = booked(Ledger, borders)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_border_that_loses_time_is_noticed() -> None:
    found, expected = booked(Forgetful, [("compute", 1.0), ("overhead", 2.0)])
    assert found != pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("account", ACCOUNTS)
def test_steps_that_were_trained_before_are_replay(account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step what belongs to steps; what was evaluated and saved again keeps its name. Step 6 is new: the twin."""
    clock = Time()
    monkeypatch.setattr(ledger, "time", clock)
    for step, name in ((5, "replay" if account in STEP_ACCOUNTS else account), (6, account)):
        book = Ledger(reached=5)
        book.at(step)
        book.switch(account)
        clock.now += 3.0
        book.switch("startup")
        assert book.seconds[name] == 3.0


def test_what_a_step_waits_for_the_next_batch_counts_with_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(ledger, "time", clock)
    book = Ledger(reached=5)
    book.step_ended(4)
    clock.now += 1.0
    book.step_ended(5)
    clock.now += 2.0
    book.switch("compute")
    assert (book.seconds["replay"], book.seconds["data_wait"]) == (1.0, 2.0)


def test_seconds_that_move_stay_as_many() -> None:
    book = Ledger()
    book.seconds["compute"] = 2.0
    book.move(0.5, "compute", "communication")
    assert (book.seconds["compute"], book.seconds["communication"]) == (1.5, 0.5)
    book.move(9.0, "compute", "communication")  # a GPU that waited while the host did something else
    assert (book.seconds["compute"], book.seconds["communication"]) == (0.0, 2.0)


def test_processes_of_a_run_and_the_time_between_them_add_up(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    began = time.time()
    for _ in range(2):
        with kept(run, 0) as book:
            book.switch("compute")
            time.sleep(0.05)
            book.step_ended(1)
        time.sleep(0.05)
    lives = lives_of(run.time_of(0))
    found = totals(lives)
    assert found is not None and [row["life"] for row in lives] == [1, 2]
    assert {row["state"] for row in lives} == {"ended"}
    assert lives[0]["began"] < began  # of the process, which did something else before
    assert lives[0]["time"] == lives[1]["began"]  # and takes the run up again: that it slept is start-up
    assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=0.01)  # rows are rounded to a millisecond
    assert read_beats(tmp_path) == [] and not heartbeat.folder_of(tmp_path).exists()


def test_what_a_process_takes_to_end_is_booked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    book_the_end(run)  # of a process that died too soon to have an account
    assert not run.time_of(0).exists()
    with kept(run, 0):
        pass
    before = totals(lives_of(run.time_of(0)))
    time.sleep(0.1)
    book_the_end(run)
    after = totals(lives_of(run.time_of(0)))
    assert before is not None and after is not None and after.num_lives == 1
    assert after.wall - before.wall > 0.09
    assert after.seconds["overhead"] - before.seconds["overhead"] == pytest.approx(after.wall - before.wall, abs=0.01)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from vlm_train.engine.ledger import kept
from vlm_train.engine.rundir import RunDirectory

with kept(RunDirectory(Path(sys.argv[1])), 0) as book:
    book.step_ended(6)
    book.switch("compute")
    time.sleep(0.3)
    book.switch("data_wait")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_one(run: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(vlm_train.__file__).parents[1])}
    environment.pop("VLM_TRAIN_PARENT", None)
    process = subprocess.run([sys.executable, "-c", KILLED, str(run)], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL


def test_a_killed_process_leaves_its_account(tmp_path: Path) -> None:
    """The twin has lost its page of memory, as another machine has it not."""
    found = {}
    for name in ("kept", "lost"):
        run = RunDirectory(tmp_path / name)
        run.create()
        kill_one(run.path)
        if name == "lost":
            page_of(run.path, 0).unlink()
        with kept(run, 0):
            pass
        found[name] = lives_of(run.time_of(0))
    first, second = found["kept"]
    assert (first["life"], first["state"], first["step"]) == (1, "killed", 6)
    assert first["seconds"]["compute"] >= 0.3
    assert sum(first["seconds"].values()) == pytest.approx(first["time"] - first["began"], abs=1e-3)
    assert (second["life"], second["state"]) == (2, "ended")
    assert [row["life"] for row in found["lost"]] == [1]


def test_what_was_reached_before_comes_from_the_records(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.reached() == 0
    run.event("start", {"step": 0, "reached": 0})
    run.event("resume", {"step": 5, "reached": 8})
    run.event("checkpoint", {"step": 10})
    assert run.reached() == 8
    run.event("resume", {"step": 10})  # by a version that did not tell
    assert run.reached() == 0


def test_time_between_lives_is_idle() -> None:
    seconds = dict.fromkeys(ACCOUNTS, 0.0)
    lives = [
        {"life": 1, "began": 100.0, "time": 110.0, "seconds": {**seconds, "compute": 6.0, "startup": 4.0}},
        {"life": 2, "began": 130.0, "time": 140.0, "seconds": {**seconds, "compute": 5.0, "replay": 5.0}},
    ]
    found = totals(lives)
    assert found is not None
    assert (found.wall, found.seconds["idle"], found.num_lives) == (40.0, 20.0, 2)
    assert sum(found.seconds.values()) == found.wall
    assert found.goodput == 11.0 / 40.0
    assert totals([]) is None


def test_a_logger_is_given_shares_of_the_whole_run() -> None:
    before = [{"life": 1, "began": time.time() - 100, "time": time.time() - 50, "seconds": {"compute": 50.0}}]
    shown = columns(before, Ledger(life=2))
    assert set(shown) == {f"time/{name}" for name in (*ACCOUNTS, "idle", "goodput")}
    assert shown["time/compute"] == pytest.approx(0.5, abs=0.01) and shown["time/idle"] == pytest.approx(0.5, abs=0.01)


def test_a_page_tells_where_a_rank_is(tmp_path: Path) -> None:
    path = page_of(tmp_path, 3)
    page = Heartbeat(path, rank=3, life=2, began=5.0)
    book = Ledger(page=page)
    book.at(17)
    book.switch("communication", b"all_gather")
    (beat,) = read_beats(tmp_path)
    assert (beat.rank, beat.life, beat.began, beat.process) == (3, 2, 5.0, os.getpid())
    assert (beat.step, beat.account, beat.collective) == (17, "communication", "all_gather")
    assert beat.moved <= time.monotonic() and beat.is_running
    assert not replace(beat, ticks=beat.ticks + 1).is_running  # the id went to another process
    book.switch("compute")
    assert read_beats(tmp_path)[0].collective == ""
    for content in (b"", b"something else", path.read_bytes()[:100]):
        path.write_bytes(content)
        assert read_beat(path) is None
    page.remove()
    assert read_beats(tmp_path) == []


def test_exchanges_of_a_step_are_communication_and_those_of_an_evaluation_are_not() -> None:
    book = Ledger()
    seen = []

    class Told(Waits):
        def begin(self, name: str, x: torch.Tensor | None) -> None:
            super().begin(name, x)
            seen.append((name, book.account))

    waiting.observe(Told(book))
    try:
        for account in ("compute", "overhead", "validation", "checkpoint"):
            book.switch(account)
            with waiting.waits("all_reduce"):
                pass
            assert book.account == account
        beside = threading.Thread(target=lambda: waiting.waits("barrier").__enter__())  # such as one that saves
        beside.start()
        beside.join()
        assert book.account == "checkpoint"
    finally:
        waiting.observe(None)
    assert [account for _, account in seen[:4]] == ["communication", "communication", "validation", "checkpoint"]


def test_nobody_is_told_of_exchanges_that_one_process_does_not_make() -> None:
    told: list[str] = []

    class Told:
        def begin(self, name: str, x: torch.Tensor | None) -> None:
            told.append(name)

        def end(self, x: torch.Tensor | None) -> None:
            pass

    waiting.observe(Told())
    try:
        collectives.all_reduce_sum(torch.ones(2))
        collectives.barrier()
    finally:
        waiting.observe(None)
    assert told == []


def test_rows_come_seldom_and_the_last_of_a_life_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One each ten seconds at first; a hundredth of the run's age later, so a month of running is a small file."""
    clock = Time()
    monkeypatch.setattr(ledger, "time", clock)
    book = Ledger(tmp_path / "time.jsonl")
    for step in range(1, 30_001):
        clock.now += 1.0
        book.step_ended(step)
    rows = [json.loads(line) for line in (tmp_path / "time.jsonl").read_text().splitlines()]
    ages = [row["time"] - row["began"] for row in rows]
    gaps = [after - before for before, after in pairwise(ages)]
    assert min(gaps) >= 10 and max(gaps) <= 301 and len(rows) < 600
    assert lives_of(tmp_path / "time.jsonl") == rows[-1:]
    append_line(tmp_path / "time.jsonl", {**rows[-1], "life": 2})
    assert [row["life"] for row in lives_of(tmp_path / "time.jsonl")] == [1, 2]
