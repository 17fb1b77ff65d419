"""Runs that stand still: when one does, what is said, and real ranks that never come back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import _runs
import _slowness
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.engine import hang
from vlm_train.engine.heartbeat import ACCOUNTS, EXIT_HANG, Beat, folder_of
from vlm_train.engine.ledger import lives_of, totals

PATIENCE = hang.Patience(seconds=None, retries=0.0, is_whole=True)
NOW = 10_000.0
TWO = ("trainer.devices=2", "strategy=ddp")


def beat(rank: int, account: str, ago: float, collective: str = "", step: int = 17) -> Beat:
    return Beat(process=1, ticks=1, rank=rank, life=1, began=0.0, step=step, account=account, moved=NOW - ago,
                collective=collective, seconds={})  # fmt: skip


def pace(step_seconds: float = 0.5, num_steps: int = 10) -> hang.Pace:
    made = hang.Pace()
    for step in range(1, num_steps + 2):
        made.see(step, step * step_seconds)
    return made


def stands(*beats: Beat, patience: hang.Patience = PATIENCE, at: hang.Pace | None = None, since: float = 0.0) -> bool:
    return hang.stands_still(beats, patience, at or pace(), NOW, since)


def test_ranks_that_wait_for_one_that_works_are_right_to() -> None:
    waiting = beat(0, "communication", 500.0, "all_reduce")
    assert stands(waiting, beat(1, "compute", 91.0))
    assert not stands(waiting, beat(1, "compute", 89.0))
    assert not stands(waiting, beat(1, "validation", 600.0))  # of which nobody knows how long it takes
    assert stands(waiting, beat(1, "validation", 2701.0))
    assert not stands(beat(0, "overhead", 600.0, step=0))  # the last step is done: reports, W&B
    assert not stands()


@given(st.floats(0.001, 100.0), st.sampled_from(ACCOUNTS))
def test_slow_steps_are_given_more_time(step_seconds: float, account: str) -> None:
    limit = PATIENCE.of(beat(0, account, 0.0), step_seconds)
    plain = max(20 * step_seconds, 90.0)
    assert limit == plain * (30 if account in ("startup", "compile", "validation", "checkpoint") else 1)


def test_until_steps_are_known_there_is_time() -> None:
    assert hang.Pace().step_seconds is None and pace(num_steps=2).step_seconds is None
    assert pace(num_steps=3).step_seconds == 0.5
    assert not stands(beat(0, "compute", 600.0), at=hang.Pace())
    assert stands(beat(0, "compute", 600.0))  # the twin


def test_pace_is_of_steps_and_not_of_looks_and_survives_a_step_back() -> None:
    made = hang.Pace()
    for step, now in ((1, 0.0), (1, 1.0), (5, 2.0), (5, 2.5), (9, 4.0), (2, 50.0), (6, 52.0)):
        made.see(step, now)
    assert made.step_seconds == 0.5


def test_a_server_that_does_not_answer_is_waited_for() -> None:
    patience = hang.Patience(seconds=None, retries=300.0, is_whole=True)
    assert not stands(beat(0, "data_wait", 389.0), patience=patience)
    assert stands(beat(0, "data_wait", 391.0), patience=patience)
    assert stands(beat(0, "compute", 91.0), patience=patience)


def test_ranks_that_may_wait_for_another_machine_are_patient() -> None:
    patience = hang.Patience(seconds=None, retries=0.0, is_whole=False)
    assert not stands(beat(0, "communication", 500.0, "all_reduce"), patience=patience)
    assert stands(beat(0, "compute", 91.0), patience=patience)  # this is the machine that the others wait for


def test_what_was_stopped_from_outside_starts_anew() -> None:
    assert not stands(beat(0, "compute", 5000.0), since=NOW - 30.0)
    assert stands(beat(0, "compute", 5000.0), since=NOW - 91.0)


STACK = """Thread 0x00007f00 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait

Current thread 0x00007f01 (most recent call first):
  File "{torch}/autograd/graph.py", line 829 in {top}
  File "/home/me/my_loss.py", line 12 in forward
  File "/x/vlm_train/training.py", line 93 in _fit
"""


def stack(top: str = "apply") -> str:
    return STACK.format(torch=f"{hang._LIBRARIES[1]}/torch", top=top)


def position(rank: int, account: str, collective: str = "", *, step: int = 17, text: str | None = None) -> dict:
    return hang.position(beat(rank, account, 61.0, collective, step), stack() if text is None else text, NOW)


def test_the_sentence_names_who_is_missing_and_where() -> None:
    ranks = [
        position(0, "communication", "all_gather"),
        position(1, "data_wait"),
        position(2, "communication", "all_gather"),
    ]
    assert hang.sentence(ranks, is_whole=True) == (
        "rank 1 has not reached all_gather of step 17, in which ranks 0 and 2 wait: "
        "rank 1 is in data_wait of step 17, at /home/me/my_loss.py, line 12, in forward, for 61 s"
    )


def test_a_rank_that_waits_for_gradients_waits() -> None:
    ranks = [position(0, "compute", text=stack(hang.BACKWARD)), position(1, "compute")]
    assert "rank 1 has not reached the reduction of the gradients of step 17" in hang.sentence(ranks, is_whole=True)
    twin = [position(0, "compute"), position(1, "compute")]
    assert hang.sentence(twin, is_whole=True).startswith("the run stands still: rank 0 is in compute")


def test_other_ways_to_stand_still() -> None:
    both = [position(0, "communication", "all_reduce"), position(1, "communication", "all_reduce")]
    assert "the network between them" in hang.sentence(both, is_whole=True)
    assert "another machine has not reached it" in hang.sentence(both, is_whole=False)
    apart = [position(0, "communication", "all_reduce"), position(1, "communication", "all_gather", step=18)]
    assert hang.sentence(apart, is_whole=True) == (
        "the ranks wait in different exchanges: rank 0 in all_reduce of step 17; rank 1 in all_gather of step 18"
    )
    silent = [position(0, "communication", "all_reduce"), position(1, "compute", text="")]
    assert "a line that it does not tell" in hang.sentence(silent, is_whole=True)


def words(data: Path, run: Path, *extra: str) -> list[str]:
    steps = ("trainer.max_steps=48", "checkpoint.every_steps=15", "trainer.hang_seconds=5")
    return _runs.train_words(data, *steps, f"run.dir={run}", *extra)


def events(run: Path, name: str) -> list[dict]:
    rows = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == name]


@pytest.mark.slow
def test_a_rank_that_never_comes_back_is_named_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, scenes: Path
) -> None:
    """Two processes; the control is the same command without the hang, under the same limit."""
    run = tmp_path / "run"
    output = _slowness.call(tmp_path, "hang", words(scenes, run, *TWO), expect=EXIT_HANG)
    (told,) = events(run, "hang")
    assert told["sentence"] in output and "remedy" in output
    assert told["sentence"].startswith(
        f"rank 1 has not reached all_reduce of step {_slowness.HANGS_AT}, in which rank 0 waits: rank 1 is in "
    )
    assert (
        f"data_wait of step {_slowness.HANGS_AT}, at " in told["sentence"] and "_slowness.py, line" in told["sentence"]
    )
    assert "in never" in (run / "hang" / "rank-1.txt").read_text()
    assert "collectives.py" in (run / "hang" / "rank-0.txt").read_text()
    _slowness.call(tmp_path, "none", words(scenes, run, *TWO))
    assert len(events(run, "hang")) == 1 and events(run, "finished")
    assert [row["step"] for row in _runs.rows(run)] == list(range(1, 49))
    found = totals(lives_of(run / "time.jsonl"))
    assert found is not None and found.num_lives == 2 and found.seconds["replay"] > 0
    assert not folder_of(run).exists()


@pytest.mark.slow
def test_a_rank_that_holds_the_interpreter_is_ended_too(tmp_path: Path, scenes: Path) -> None:
    """It can do nothing for its own end; its stack comes all the same, from C."""
    run = tmp_path / "run"
    _slowness.call(tmp_path, "deaf", words(scenes, run, *TWO), expect=EXIT_HANG)
    (told,) = events(run, "hang")
    assert (
        f"rank 1 has not reached all_reduce of step {_slowness.HANGS_AT}" in told["sentence"]
        and "_slowness.py" in told["sentence"]
    )


@pytest.mark.slow
def test_one_rank_alone_and_no_watchdog_where_none_is_wanted(tmp_path: Path, scenes: Path) -> None:
    alone = tmp_path / "alone"
    _slowness.call(tmp_path, "hang", words(scenes, alone), expect=EXIT_HANG)
    assert events(alone, "hang")[0]["sentence"].startswith(
        f"the run stands still: rank 0 is in data_wait of step {_slowness.HANGS_AT}, at "
    )
    process = _runs.start(
        tmp_path, [*words(scenes, tmp_path / "off", "trainer.hang_seconds=0", "trainer.max_steps=5000")]
    )
    try:
        deadline = time.monotonic() + 200
        while _runs.last_step(tmp_path / "off") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        listed = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not [line for line in listed if b"engine.watchdog" in line and str(tmp_path / "off").encode() in line]
    finally:
        process.kill()
        process.wait()
