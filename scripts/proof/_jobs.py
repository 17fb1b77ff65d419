"""Runs that are jobs of the real SLURM of `_clusters`: submitted, preempted, signalled, killed, and waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import _clusters
import _runs
import psutil

from vlm_train.cli.slurm_watch import state_of

PATIENCE = 600.0  # seconds
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
CPUS = ("trainer.accelerator=cpu", "data.num_workers=0")  # a job needs one processor a rank, and no GPU


@dataclass(frozen=True, slots=True)
class Job:
    """A job, or a task of an array (`NUMBER_TASK`), and the run that it trains."""

    number: str
    run: Path

    def state(self) -> str:
        """In SLURM's words."""
        return state_of(self.number)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Lines of events.jsonl with these names."""
        path = self.run / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [row for row in map(json.loads, lines) if row["event"] in names]

    def requeues(self) -> int:
        """How often it was queued again by a decision of ours."""
        return len(self.events("requeue"))

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Waits. Raises AssertionError with the log where the job ends first or it takes too long."""
        deadline, asked = time.monotonic() + PATIENCE, 0.0
        while not is_so():
            time.sleep(0.01)
            if time.monotonic() - asked > 0.5:
                self.hurry()
                ended, asked = self.state() in ENDED and not is_so(), time.monotonic()
                assert not ended and asked < deadline, f"{what}: {self.state()}\n{self.log()[-6000:]}"

    def hurry(self) -> None:
        """Takes from a job that was queued again the two minutes that SLURM makes it wait; not while the processes of
        its last start are there, nor in the second in which they ended: SLURM has revoked what lets it start until then
        ("Job credential revoked")."""
        told = _clusters.told("scontrol", "--oneliner", "show", "job", self.number)
        number, start = re.search(r"\bJobId=(\d+)", told), re.search(r" StartTime=(\d\S+)", told)
        if number is None or start is None or "Reason=BeginTime" not in told:
            return
        is_far = datetime.fromisoformat(start[1]) - datetime.now() > timedelta(seconds=10)
        if is_far and not _has_steps(number[1]):
            _clusters.told("scontrol", "update", f"JobId={self.number}", "StartTime=now+3")

    def hold(self, step: int) -> None:
        """Stops its ranks (SIGSTOP) after the step or soon after it, whatever the machine is doing; SLURM continues
        what it preempts, others are continued by `go_on`."""
        self.until(lambda: _runs.last_step(self.run) >= step, f"step {step}")
        self._suspend()

    def hold_in_a_save(self) -> None:
        """As `hold`, while a checkpoint is being written; see `slow_disk`."""
        self.until(self._is_saving, "a save")
        self._suspend()
        assert self._is_saving(), "it was saved too soon"

    def _is_saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".step-*.tmp-*"))

    def _suspend(self) -> None:
        for process in self.ranks().values():
            process.suspend()
        assert not self.events("finished"), "it was done too soon"

    def go_on(self) -> None:
        """Continues its ranks."""
        for process in self.ranks().values():
            process.resume()

    def end(self) -> str:
        """Waits for the end of the job: its state."""
        self.until(lambda: self.state() in ENDED, "the end")
        return self.state()

    def log(self) -> str:
        """What the job wrote."""
        places = [*self.run.glob("submit/*/*log.txt"), *self.run.parent.glob("submit/*/*log.txt")]
        return "\n".join(path.read_text(errors="replace") for path in places)

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of its ranks; none of another run."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "vlm_train.cli.rank" in words and str(self.run) in words and "srun" not in words[0]:
                found[_rank_of(process)] = process
        return {rank: process for rank, process in found.items() if rank is not None}


def _has_steps(job: str) -> bool:
    """Whether the system runs a step of a job, its script among them."""
    names = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return any(name.startswith(f"slurmstepd: [{job}.") for name in names)


def _rank_of(process: psutil.Process) -> int | None:
    try:
        number = process.environ().get("SLURM_PROCID")
    except psutil.Error:
        return None
    return None if number is None else int(number)


def submit(folder: Path, words: Sequence[str], *extra: str) -> list[Job]:
    """Sends `vlm-train train WORDS` as a job, with words that are about the job. One for each run."""
    told = _runs.call(folder, ["submit", *words[1:], "launch.cpus=1", *extra])
    number, place = re.findall(r"^job (\d+): (.*)/job\.sbatch$", told, re.MULTILINE)[0]
    runs = sorted({path.parent for path in Path(place).glob("tasks/*/config.yaml")})
    if len(runs) == 1:
        return [Job(number, Path(place).parent.parent)]
    names = [re.findall(r"^  dir: (.*)$", (task / "config.yaml").read_text(), re.MULTILINE)[0] for task in runs]
    return [Job(f"{number}_{index}", folder / name) for index, name in enumerate(names)]


def preempt(job: Job) -> None:
    """A job of the partition `high` takes all processors for a moment. Waits until this one has started again."""
    before = len(job.events("start", "resume"))
    told = _clusters.told("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null",
                          "--wrap=sleep 1")  # fmt: skip
    _clusters.until(lambda: state_of(told.strip()) == "COMPLETED", "the job that preempts", patience=PATIENCE)
    job.until(lambda: len(job.events("start", "resume")) > before, "another start")


def signalled(job: Job, name: str) -> None:
    """`scancel --signal`, which reaches the ranks and leaves the job. Waits until it has started again."""
    before = len(job.events("start", "resume"))
    _clusters.told("scancel", f"--signal={name}", job.number)
    job.go_on()
    job.until(lambda: len(job.events("start", "resume")) > before, "another start")


def requeued(job: Job) -> None:
    """`scontrol requeue` by somebody else, which ends the ranks as a preemption does. Waits until it has started
    again."""
    before = len(job.events("start", "resume"))
    _clusters.told("scontrol", "requeue", job.number)
    job.go_on()
    job.until(lambda: len(job.events("start", "resume")) > before, "another start")


def killed(job: Job, rank: int) -> None:
    """SIGKILL to one rank. Waits until the job has started again."""
    before = len(job.events("start", "resume"))
    os.kill(job.ranks()[rank].pid, signal.SIGKILL)
    job.until(lambda: len(job.events("start", "resume")) > before, "another start")


def dying(folder: Path) -> str:
    """A word for `submit` whose rank 1 is killed at each of its starts."""
    return _hook(folder, "import os\nif os.environ.get('SLURM_PROCID') == '1':\n    os.kill(os.getpid(), 9)\n")


def slow_disk(folder: Path) -> str:
    """A word for `submit` whose ranks take half a second for each flush to the disk."""
    return _hook(
        folder, "import os, time\nplain = os.fsync\nos.fsync = lambda file: (time.sleep(0.5), plain(file))[1]\n"
    )


def _hook(folder: Path, code: str) -> str:
    """A word for `submit` whose processes run this first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return f'launch.setup=["export PYTHONPATH={folder}"]'
