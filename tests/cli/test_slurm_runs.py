"""Runs as jobs of a real SLURM: preempted, signalled, killed, and queued again until they are trained.

The short form of scripts/proof/slurm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _clusters
import _jobs
import _runs
import pytest

pytestmark = pytest.mark.slow
DDP = ("trainer.devices=2", "strategy=ddp")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Words that send a job to a partition whose jobs are preempted."""
    if lack := _clusters.lacks_slurm():
        pytest.skip(lack)
    with _clusters.slurm_cluster(tmp_path_factory.mktemp("slurm") / "daemons", num_cpus=2):
        yield ["launch.partition=low"]


def words(data: Path, run: Path, *extra: str) -> list[str]:
    steps = ("trainer.max_steps=200", "checkpoint.every_steps=50", "evaluation=none")
    return _runs.train_words(data, *steps, *_jobs.CPUS, f"run.dir={run}", *extra)


def test_a_job_that_is_preempted_and_killed_learns_what_one_learns_that_nobody_touches(
    tmp_path: Path, scenes: Path, slurm: list[str]
) -> None:
    (job,) = _jobs.submit(tmp_path, words(scenes, tmp_path / "job", *DDP), *slurm)
    job.hold(5)
    _runs.call(tmp_path, words(scenes, tmp_path / "other", *DDP, "seed=1"))
    _runs.call(tmp_path, words(scenes, tmp_path / "untouched", *DDP))
    _jobs.preempt(job)
    stopped = job.events("interrupted")[-1]["step"]
    assert job.events("resume")[-1]["step"] == stopped >= 5  # what was trained was saved
    job.hold(stopped + 3)
    _jobs.killed(job, rank=1)
    assert job.end() == "COMPLETED"
    assert [row["reason"] for row in job.events("requeue")] == ["SIGTERM", "exit code 137"]
    assert _runs.learned(job.run) == _runs.learned(tmp_path / "untouched") != _runs.learned(tmp_path / "other")


def test_tasks_of_an_array_go_on_by_themselves(tmp_path: Path, scenes: Path, slurm: list[str]) -> None:
    jobs = _jobs.submit(tmp_path, words(scenes, Path("sweep")), *slurm, "--sweep", "seed=0,1")
    assert [job.run.name for job in jobs] == ["00-seed-0", "01-seed-1"]
    jobs[0].hold(5)
    _clusters.told("scancel", jobs[0].number)  # warns it as a preemption does, and is meant otherwise
    jobs[1].hold(5)
    _jobs.signalled(jobs[1], "USR2")
    assert [job.end() for job in jobs] == ["CANCELLED", "COMPLETED"]
    assert [job.requeues() for job in jobs] == [0, 1]
    _runs.call(tmp_path, words(scenes, tmp_path / "alone", "seed=1"))
    assert _runs.learned(jobs[1].run) == _runs.learned(tmp_path / "alone") != _runs.learned(jobs[0].run)


def test_a_job_that_gets_no_further_fails_and_says_why(tmp_path: Path, scenes: Path, slurm: list[str]) -> None:
    """A rank that is killed at its start, every time."""
    (job,) = _jobs.submit(tmp_path, words(scenes, tmp_path / "dies", *DDP), *slurm, _jobs.dying(tmp_path / "hook"))
    assert job.end() == "FAILED"
    assert job.requeues() == 0 and "no further than step 0" in job.events("not_requeued")[0]["because"]
