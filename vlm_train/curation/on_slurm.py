"""Functions of shards as a job array of SLURM, which says where and when each task runs.

A map writes its calls into a folder of its own, one file a task, and submits one array of `slurm_task`, each task of
which leaves its results beside its call. At the end of the map the folder goes. The file system of the folder, of the
interpreter and of what the functions read and write is one that all nodes share.

A driver that ends, ends its array. One that is killed cannot: its tasks go on and finish what they can, and the next
command for the same output ends the rest (`end_left`), then submits what is not finished.
"""

from __future__ import annotations

import logging
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_train.curation.slurm_task import Call, call_file, result_file
from vlm_train.data.home import write_whole
from vlm_train.errors import ConfigError, VlmError
from vlm_train.log import get_logger

log: logging.Logger = get_logger(__name__)

_NAME = "vlm-train-"
_MOST_TASKS = 1000  # of an array, where SLURM allows more: beyond it a task takes several items
_TASKS_OF_A_WORKER = 4  # so that one with large shards holds up the others for a part of the time only
_FIRST, _LONGEST = 1.0, 30.0  # seconds between two questions to SLURM: the first, and at most
_GRACE = 90.0  # seconds until what a task of another machine wrote is surely seen (NFS keeps what it knew for 60)
_LOG_LINES, _LOG_BYTES = 20, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """Job arrays of SLURM.

    `folder`: in which maps keep their files; `num_workers`: tasks at a time, None is as many as SLURM lets run; `cpus`:
    processors of a task; `gres`: of a task that runs a model, such as gpu:1; `options`: others of sbatch, by their long
    names.
    """

    folder: Path
    num_workers: int | None = None
    cpus: int = 1
    gres: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, runs_model: bool = False) -> Iterator[Any]:
        """See `Engine.map`. A task maps its items with as many processes as it has processors."""
        if not items:
            return
        if shutil.which("sbatch") is None:
            raise ConfigError("there is no SLURM here", got="no sbatch on PATH", allowed="a machine that submits jobs",
                              remedy="run it on a login node, or use another engine")  # fmt: skip
        shares = _shares(items, self._num_tasks(len(items)), self.cpus)
        folder = _make_folder(self.folder)
        for number, share in enumerate(shares):
            call = Call(function, share, runs_model=runs_model, num_processes=self.cpus)
            write_whole(call_file(folder, number), pickle.dumps(call))
        try:
            job = self._submit(folder, len(shares), runs_model)
            for number in range(len(shares)):
                yield from _result(folder, job, number)
        finally:
            _cancel(folder)
            _remove(folder)

    def _num_tasks(self, num_items: int) -> int:
        found = _told("scontrol", "show", "config")
        sizes = [line.split("=")[1] for line in (found or "").splitlines() if line.startswith("MaxArraySize")]
        most = min(_MOST_TASKS, int(sizes[0]) if sizes else _MOST_TASKS)
        return min(num_items, most, _TASKS_OF_A_WORKER * self.num_workers if self.num_workers else most)

    def _submit(self, folder: Path, num_tasks: int, runs_model: bool) -> str:
        """The number of the job."""
        at_once = f"%{self.num_workers}" if self.num_workers else ""
        log_file = str(folder).replace("%", "%%") + "/%a.log"
        command = [sys.executable, "-m", "vlm_train.curation.slurm_task", str(folder)]
        words = ["sbatch", "--parsable", "--requeue", f"--job-name={_NAME}{folder.name}", f"--output={log_file}",
                 f"--array=0-{num_tasks - 1}{at_once}", "--ntasks=1", f"--cpus-per-task={self.cpus}",
                 *(f"--{name}={value}" for name, value in self.options.items()),
                 *([f"--gres={self.gres}"] if self.gres and runs_model else []),
                 f"--wrap=exec {shlex.join(command)}"]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise ConfigError("SLURM does not take the job", got=done.stderr.strip() or done.stdout.strip(),
                              allowed="what sinfo shows, within your limits", remedy="change --slurm")  # fmt: skip
        job = done.stdout.strip().partition(";")[0]
        log.info("SLURM job %s: %d tasks, whose logs are in %s until it ends", job, num_tasks, folder)
        return job


def end_left(folder: Path) -> None:
    """Ends the arrays of drivers that were killed, and removes what they have left in `folder`."""
    for left in folder.iterdir() if folder.is_dir() else ():
        _cancel(left)
        deadline = time.monotonic() + _LONGEST
        while _waiting(left) and time.monotonic() < deadline:
            time.sleep(_FIRST)
        _remove(left)


def _make_folder(parent: Path) -> Path:
    """A folder that its owner alone can enter, which `slurm_task` asks for."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=parent.absolute(), prefix=""))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a task that is being ended may write its log once more
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _shares(items: Sequence[Any], num_tasks: int, at_least: int) -> list[Sequence[Any]]:
    size = max(at_least, -(-len(items) // num_tasks))
    return [items[start : start + size] for start in range(0, len(items), size)]


def _result(folder: Path, job: str, number: int) -> Iterator[Any]:
    """What a task found. Raises what its function raised, and VlmError where it did not come to its end."""
    path = result_file(folder, number)
    pause, gone = _FIRST, 0.0
    while not _comes(path, pause):
        waiting = _waiting(folder)
        if waiting is not None and number not in waiting:
            gone += pause
            state = _state(job, number)
            if not path.exists() and (not state.startswith("COMPLETED") or gone > _GRACE):
                raise VlmError(f"task {number} of SLURM job {job} did not come to its end",
                               got=f"{state}; its log ends so:{_log_end(folder, number)}",
                               remedy="mend that, then start again: what is finished stays")  # fmt: skip
        pause = min(2 * pause, _LONGEST)
    found, error = pickle.loads(path.read_bytes())  # a file of our own, in a folder that nobody else can enter
    yield from found
    if error is not None:
        raise error


def _comes(path: Path, seconds: float) -> bool:
    """Whether a file is there within some seconds."""
    deadline = time.monotonic() + seconds
    while not (is_there := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return is_there


def _waiting(folder: Path) -> set[int] | None:
    """The tasks that wait or run; None where SLURM does not answer, as while its controller starts anew."""
    found = _told("squeue", "--noheader", "--array", f"--name={_NAME}{folder.name}", "--format=%K")
    return None if found is None else {int(word) for word in found.split() if word.isdecimal()}


def _state(job: str, number: int) -> str:
    """How a task ended, as far as SLURM still knows."""
    found = _told("scontrol", "show", "job", f"{job}_{number}", "--oneliner") or ""
    facts = dict(word.split("=", 1) for word in found.split() if "=" in word)
    if "JobState" not in facts:
        return "SLURM knows it no more"
    return f"{facts['JobState']} ({facts.get('Reason')}), exit code {facts.get('ExitCode')}"


def _log_end(folder: Path, number: int) -> str:
    try:
        with open(folder / f"{number}.log", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        lines = []
    return "".join(f"\n    {line}" for line in lines) or " (it is empty)"


def _cancel(folder: Path) -> None:
    _told("scancel", f"--name={_NAME}{folder.name}")


def _told(*command: str) -> str | None:
    """What a command of SLURM prints; None where it fails, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return None if done.returncode else done.stdout
