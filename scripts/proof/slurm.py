"""Jobs of a real SLURM that are stopped in every way, and queued again until they are done, learn what an untouched run
learns.

    python scripts/proof/slurm.py            preempted, signalled, killed, an array, a crash loop: some minutes
    python scripts/proof/slurm.py --full     and at its start, in a save, out of time, with more kills, in stages

A controller, a node and their key are started here and ended (`apt-get install slurm-wlm munge`, as root). Two ranks
(DDP) unless a row says one. Compared is metrics.jsonl as text, but for the columns that measure the machine, with a run
of `vlm-train train`; the control is one with another seed. Steps trained again are those that metrics.jsonl told before
a restart and that came after the checkpoint it went on from; the control is the run that is killed instead of asked.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import _clusters
import _jobs
import _runs
from _table import Row, arguments, report
from kill_resume import num_different_lines

STEPS = ("trainer.max_steps=120", "checkpoint.every_steps=50", "evaluation=none")
DDP = ("trainer.devices=2", "strategy=ddp")
LOW = "launch.partition=low"


def main() -> int:
    options = arguments(__doc__)
    if lack := _clusters.lacks_slurm():
        print(f"no SLURM: {lack}", file=sys.stderr)
        return 1
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name, _clusters.slurm_cluster(Path(name) / "slurm", num_cpus=2):
        proof = Proof(Path(name), _runs.make_scenes(Path(name)))
        rows = proof.stopped() + proof.array() + proof.given_up()
        if options.full:
            rows += (
                proof.at_its_start()
                + proof.in_a_save()
                + proof.at_the_end_of_its_time()
                + proof.killed_often()
                + proof.stages()
            )
        return report(rows, options.json)


@dataclass(frozen=True, slots=True)
class Proof:
    """A folder for runs, and their data."""

    folder: Path
    data: Path

    def words(self, name: str, *extra: str) -> list[str]:
        return _runs.train_words(self.data, *STEPS, *_jobs.CPUS, f"run.dir={self.folder / name}", *extra)

    def run(self, name: str, *extra: str) -> Path:
        """A run that nobody touches."""
        if not (self.folder / name).exists():
            _runs.call(self.folder, self.words(name, *extra))
        return self.folder / name

    def job(self, name: str, *extra: str) -> _jobs.Job:
        (job,) = _jobs.submit(self.folder, self.words(name, *DDP), LOW, *extra)
        return job

    def stopped(self) -> list[Row]:
        """Rows for one stop of each kind, at a step that no checkpoint was due at."""
        ways: dict[str, Callable[[_jobs.Job], None]] = {
            "killed (SIGKILL to one rank)": lambda job: _jobs.killed(job, rank=1),
            "preempted (SIGTERM)": _jobs.preempt,
            "scancel --signal=USR2": lambda job: _jobs.signalled(job, "USR2"),
        }
        rows: list[Row] = []
        lost_when_killed = 0
        for number, (label, stop) in enumerate(ways.items()):
            is_mirrored = stop is _jobs.preempt
            wandb = ("logger=wandb", "logger.mode=offline") if is_mirrored else ()
            job = self.job(f"stopped-{number}", *wandb)
            job.hold(7)
            stop(job)
            rows += self.compared(label, job)
            lost = trained_again(job)
            lost_when_killed = lost_when_killed or lost
            rows += [Row(claim=f"{label}: steps trained again", value=lost, bar=0, sense="==", control=lost_when_killed)
                     ] if number else []  # fmt: skip
            rows += [Row(claim=f"{label}: names of its runs of W&B", value=len(mirrors(job)), bar=1, sense="==")
                     ] if is_mirrored else []  # fmt: skip
        return rows

    def compared(self, label: str, job: _jobs.Job, *, num_requeues: int = 1) -> list[Row]:
        """Rows for the end of a job of two ranks."""
        state = job.end()
        print(f"{label}: {state}, {job.requeues()} times queued again", flush=True)
        untouched, other = self.run("untouched", *DDP), self.run("other", *DDP, "seed=1")
        return [
            Row(claim=f"{label}: COMPLETED, queued again", value=job.requeues() if state == "COMPLETED" else -1,
                bar=num_requeues, sense="=="),
            Row(claim=f"{label}: steps that differ", value=num_different_lines(job.run, untouched), bar=0, sense="==",
                control=num_different_lines(other, untouched)),
        ]  # fmt: skip

    def array(self) -> list[Row]:
        """Rows for one task of an array of two, one rank each, that is asked to stop."""
        jobs = _jobs.submit(self.folder, self.words("sweep"), LOW, "--sweep", "seed=0,1")
        jobs[1].hold(7)
        _jobs.signalled(jobs[1], "USR1")
        states = [job.end() for job in jobs]
        alone = self.run("alone", "seed=1")
        return [
            Row(claim="array: tasks that were COMPLETED", value=states.count("COMPLETED"), bar=2, sense="=="),
            Row(claim="array: times that the other task was queued again", value=jobs[0].requeues(), bar=0, sense="==",
                control=jobs[1].requeues()),
            Row(claim="array: steps that differ", value=num_different_lines(jobs[1].run, alone), bar=0, sense="==",
                control=num_different_lines(jobs[0].run, alone)),
        ]  # fmt: skip

    def given_up(self) -> list[Row]:
        """Rows for jobs that go on no longer."""
        loop = self.job("loop", _jobs.dying(self.folder / "hook"))
        capped = self.job("capped", "launch.max_requeues=1")
        ends = {"dies at each start": (loop, loop.end(), 0)}
        capped.hold(3)
        _jobs.signalled(capped, "USR1")
        capped.hold(capped.events("resume")[-1]["step"] + 2)
        _clusters.told("scancel", "--signal=USR1", capped.number)
        capped.go_on()
        ends["asked to stop beyond launch.max_requeues=1"] = capped, capped.end(), 1
        rows = []
        for label, (job, state, bar) in ends.items():
            print(f"{label}: {state}", flush=True)
            gave_up = state == "FAILED" and len(job.events("not_requeued")) == 1
            rows.append(Row(claim=f"{label}: FAILED with its reason, queued again",
                            value=job.requeues() if gave_up else -1, bar=bar, sense="=="))  # fmt: skip
        return rows

    def at_its_start(self) -> list[Row]:
        """Rows for a job that is preempted before its ranks have begun to train."""
        job = self.job("early")
        job.until(lambda: len(job.ranks()) == 2, "ranks")
        _jobs.preempt(job)
        assert job.events("requeue")[0]["step"] == 0, "it had trained already"
        return self.compared("preempted at its start", job)

    def in_a_save(self) -> list[Row]:
        """Rows for jobs that are preempted, and queued again by somebody else, while a checkpoint is written."""
        hook, rows = _jobs.slow_disk(self.folder / "slow"), []
        for name, stop, num_requeues in (("preempted", _jobs.preempt, 1), ("scontrol requeue", _jobs.requeued, 0)):
            job = self.job(f"saving-{num_requeues}", hook)
            job.hold_in_a_save()
            stop(job)
            rows += self.compared(f"{name} in a save", job, num_requeues=num_requeues)
        return rows

    def at_the_end_of_its_time(self) -> list[Row]:
        """Rows for a job that asked for less time than it needs: SLURM warns it by USR1."""
        job = self.job("short", "launch.time=3", "launch.signal_seconds=60")
        job.hold(7)
        before = len(job.events("start", "resume"))
        job.until(lambda: all(is_pending(process.pid, signal.SIGUSR1) for process in job.ranks().values()), "USR1")
        job.go_on()
        job.until(lambda: len(job.events("start", "resume")) > before, "another start")
        label = "end of its time (USR1)"
        return [*self.compared(label, job),
                Row(claim=f"{label}: steps trained again", value=trained_again(job), bar=0, sense="==")]  # fmt: skip

    def killed_often(self, num_kills: int = 5) -> list[Row]:
        """Rows for ranks that are killed in turn, each time further on."""
        job = self.job("often")
        for number in range(num_kills):
            job.hold(5 + 20 * number)
            _jobs.killed(job, rank=number % 2)
        return self.compared(f"killed {num_kills} times", job, num_requeues=num_kills)

    def stages(self) -> list[Row]:
        """Rows for a run in two stages that is preempted in the second."""
        changes = ("++stages.one.optim.lr=1e-3", "++stages.two.optim.lr=1e-4")
        (job,) = _jobs.submit(self.folder, self.words("stages", *changes), LOW)
        second = _jobs.Job(job.number, job.run / "stage-02-two")
        second.hold(7)
        _jobs.preempt(second)
        state, alone = job.end(), self.run("stages-alone", *changes)
        rows = [Row(claim="stages: COMPLETED", value=state == "COMPLETED", bar=1, sense="==")]
        differ = num_different_lines(second.run, alone / "stage-02-two")
        first = num_different_lines(alone / "stage-01-one", alone / "stage-02-two")
        return [*rows, Row(claim="stages: steps that differ", value=differ, bar=0, sense="==", control=first)]


def trained_again(job: _jobs.Job) -> int:
    """Steps that were told before a restart and lay beyond what it went on from."""
    return sum(row["reached"] - row["step"] for row in job.events("start", "resume"))


def mirrors(job: _jobs.Job) -> Sequence[str]:
    """The names of the runs that were written for W&B."""
    return sorted({path.name.split("-", 3)[-1] for path in job.run.glob("wandb/*run-*")})


def is_pending(process: int, number: int) -> bool:
    """Whether a process that is stopped has a signal waiting for it."""
    masks = [line.split()[1] for line in Path(f"/proc/{process}/status").read_text().splitlines() if "Pnd:" in line]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


if __name__ == "__main__":
    sys.exit(main())
