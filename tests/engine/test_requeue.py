"""Which jobs are queued again: those that were asked to stop, and those that failed further on than ever before."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.engine.requeue import MAX_REQUEUES, Job, decide, requeue
from vlm_train.engine.rundir import RunDirectory, append_line, read_lines

JOB = Job(id="7", num_restarts=1, max_requeues=5)


def begun(path: Path, *, step: int, reached: int) -> RunDirectory:
    """A run that started after `step` and has trained up to `reached`."""
    run = RunDirectory(path)
    run.create()
    run.event("resume" if step else "start", {"step": step})
    for number in range(step + 1, reached + 1):
        append_line(run.metrics, {"step": number})
    return run


def last(run: RunDirectory) -> dict[str, object]:
    return list(read_lines(run.events))[-1]


def test_a_run_that_was_asked_to_stop_goes_on_without_a_step(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", step=0, reached=0)
    run.event("interrupted", {"step": 0, "signal": "SIGTERM"})
    assert decide(run, JOB, 143)
    assert last(run)["event"] == "requeue" and last(run)["reason"] == "SIGTERM" and last(run)["job"] == "7"
    run.event("start", {"step": 0})
    assert not decide(run, JOB, 1)  # the twin: what it was asked before it started again is no reason now


def test_a_start_that_srun_ended_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that dies before training has the others ended by SIGTERM; the twin: a preemption at that moment."""
    for number, (told, is_queued) in enumerate([("PreemptTime=None", False), ("PreemptTime=2026-01-01", True)]):
        monkeypatch.setattr(
            "vlm_train.engine.requeue.scontrol", lambda *_, told=told: (f"JobState=RUNNING {told}", None)
        )
        run = begun(tmp_path / str(number), step=0, reached=0)
        run.event("interrupted", {"step": 0, "signal": "SIGTERM"})
        assert decide(run, JOB, 143) == is_queued


def test_a_rank_that_dies_at_one_step_again_and_again_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others, which srun ends by SIGTERM, have saved nothing then; the twin: they have, and were asked to."""
    monkeypatch.setattr("vlm_train.engine.requeue.scontrol", lambda *_: ("JobState=RUNNING PreemptTime=None", None))
    run = begun(tmp_path, step=50, reached=57)
    for step, is_queued in ((50, True), (50, False), (57, True)):
        run.event("interrupted", {"step": step, "signal": "SIGTERM"})
        assert decide(run, JOB, 137) == is_queued
        run.event("resume", {"step": 50})


def test_a_failure_goes_on_where_it_got_further_and_not_where_it_did_not(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", step=0, reached=3)
    assert decide(run, JOB, 137)
    run.event("start", {"step": 0})  # no checkpoint yet: the same steps again
    assert not decide(run, JOB, 137)
    assert "no further than step 3" in str(last(run)["because"])
    run.event("start", {"step": 0})
    assert decide(run, Job(id="8", num_restarts=0, max_requeues=5), 137)  # what was submitted anew has its own tries


def test_a_mistake_of_the_user_and_the_cap_end_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "mistake", step=0, reached=3)
    assert not decide(run, JOB, 2)
    run = begun(tmp_path / "cap", step=0, reached=3)
    run.event("interrupted", {"step": 3, "signal": "SIGUSR1"})
    assert not decide(run, Job(id="7", num_restarts=5, max_requeues=5), 138)
    assert "launch.max_requeues=5" in str(last(run)["because"])


def test_what_rank_0_decided_is_not_decided_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scontrol rank 0 leaves it to the batch script, which asks again."""
    run = begun(tmp_path / "run", step=0, reached=3)
    run.event("interrupted", {"step": 3, "signal": "SIGUSR1"})
    assert decide(run, JOB, 138)
    monkeypatch.setenv("PATH", "")
    assert not requeue(run, JOB) and last(run)["event"] == "requeue_refused"
    assert decide(run, JOB, 75) and last(run)["event"] == "requeue_refused"
    run.event("not_requeued", {})
    assert not decide(run, JOB, 138)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_no_crash_loop_is_longer_than_its_steps(tmp_path_factory: pytest.TempPathFactory, gains: list[int]) -> None:
    """Whatever the starts gain, each but the last that is queued again got further than all before."""
    run = begun(tmp_path_factory.mktemp("run"), step=0, reached=0)
    reached = 0
    for num_requeues, gain in enumerate(gains):
        for step in range(reached + 1, reached + gain + 1):
            append_line(run.metrics, {"step": step})
        reached += gain
        wants = decide(run, Job(id="7", num_restarts=num_requeues, max_requeues=100), 1)
        assert wants == (gain > 0)
        if not wants:
            return
        run.event("resume", {"step": 0})


def test_the_job_of_an_environment() -> None:
    names = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}
    assert Job.from_environment(names) is None  # by hand: nobody asked for it
    assert Job.from_environment({**names, MAX_REQUEUES: "9"}) == Job(id="12", num_restarts=2, max_requeues=9)
    array = {**names, "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3", MAX_REQUEUES: "9"}
    assert Job.from_environment(array) == Job(id="11_3", num_restarts=2, max_requeues=9)
