"""SIGKILL at a chosen instant of a run, and what is left of its checkpoints: for kill_resume.py.

From outside, a watcher waits for what the run's files tell (a step, a half-written checkpoint, an evaluation) and some
random milliseconds, and kills a random one of the run's processes: a rank, or the launcher. From inside, the thread
that writes checkpoints kills its own process before its n-th call of `CALLS`, so no instant between two changes of the
disk is too short to be met. Interpreters that the launcher starts are told by the environment, through a
`sitecustomize`.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import _runs

PHASES = ("start-up", "step", "save", "commit", "evaluation")
CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
COMMITS = re.compile(r"manifest|LATEST|(rename|fsync) \.?step-|fsync checkpoints|unlink|rmdir")
"""Of a call and what it was about to change: those from the manifest on, retiring included."""
EVALUATE_EVERY = 5


def install() -> None:
    """In a process that `KILL_AT_CALL` (RANK:NUMBER:FILE) means: dies before that call, and writes to FILE which."""
    rank, _, rest = os.environ.get("KILL_AT_CALL", "").partition(":")
    if not rest or rank != os.environ.get("RANK", "0"):
        return
    number, _, file = rest.partition(":")
    count = 0

    def watched(name: str, call: Callable[..., Any], *words: Any, **options: Any) -> Any:
        nonlocal count
        if threading.current_thread().name == "checkpoint":
            count += 1
            if count == int(number):
                where = os.readlink(f"/proc/self/fd/{words[0]}") if name == "fsync" else words[0]
                Path(file).write_text(f"{name} {Path(os.fsdecode(where)).name}")
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*words, **options)

    def wrapped(name: str) -> Callable[..., Any]:
        call = getattr(os, name)
        return lambda *words, **options: watched(name, call, *words, **options)

    for name in CALLS:
        setattr(os, name, wrapped(name))


class Killer:
    """Starts one run again and again and kills it.

    Args:
        folder: where it is started, and where logs lie.
        words: its command.
        run: its directory.
        num_ranks: 1: no launcher.
        choose: of instants and of the process that is killed.
    """

    def __init__(self, folder: Path, words: Sequence[str], run: Path, num_ranks: int, choose: random.Random) -> None:
        self.folder, self.words, self.run, self.num_ranks, self.choose = folder, words, run, num_ranks, choose
        self._start_seconds = 3.0 if num_ranks == 1 else 8.0
        (folder / "log.txt").touch()
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text("import _killing\n_killing.install()\n")
        self._paths = f"{site}:{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"

    def kill_in(self, phase: str) -> str | None:
        """Starts the run and kills it in a phase: the phase it was in, or None where it ended before by itself."""
        note = self.folder / "killed-at.txt"
        note.unlink(missing_ok=True)
        environment = {"PYTHONPATH": self._paths}
        if phase in ("save", "commit") and self.choose.random() < (1.0 if phase == "commit" else 0.5):
            environment["KILL_AT_CALL"] = f"{self.choose.randrange(self.num_ranks)}:{self.choose.randint(1, 30)}:{note}"
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_command, args=(str(self.folder), list(self.words), environment))
        process.start()
        met = self._watch(process, phase, patient="KILL_AT_CALL" in environment)
        process.join(120)
        assert process.exitcode is not None, f"{self.run} goes on after a {phase} kill"
        ended_itself = process.exitcode == 0
        _until_gone(str(self.run))
        if note.exists():
            return "commit" if COMMITS.search(note.read_text()) else "save"
        if not ended_itself and met is None:
            raise AssertionError(f"the run failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
        return None if ended_itself else met

    def _watch(self, process: BaseProcess, phase: str, *, patient: bool) -> str | None:
        """Waits for the instant and kills. `patient`: the process will do it itself."""
        began, first = time.monotonic(), _runs.last_step(self.run)
        wanted, delay = first + self.choose.randint(1, 9), self.choose.uniform(0, self._start_seconds)
        has_started = False
        while process.is_alive():
            step = _runs.last_step(self.run)
            if step != first and not has_started:
                has_started, self._start_seconds = True, time.monotonic() - began
            reached = {
                "start-up": time.monotonic() - began > delay,
                "step": step >= wanted,
                "save": any((self.run / "checkpoints").glob(".step-*.tmp-*")),
                "evaluation": has_started and step % EVALUATE_EVERY == 0,
                "commit": False,
            }[phase]
            if reached and not patient:
                time.sleep(0 if phase == "start-up" else self.choose.uniform(0, 0.02))
                return self._kill(process, "step" if phase == "start-up" and has_started else phase)
            time.sleep(0.001)
        return None

    def _kill(self, process: BaseProcess, phase: str) -> str | None:
        """A random one of the run's processes; None where it has ended meanwhile."""
        found = [int(process.pid or 0), *_processes_of(str(self.run), "vlm_train.cli.rank")]
        try:
            os.kill(self.choose.choice(found), signal.SIGKILL)
        except ProcessLookupError:
            return None
        return phase


def _command(folder: str, words: list[str], environment: dict[str, str]) -> None:
    """What a started process does: as `vlm-train WORDS`, with what it says in log.txt."""
    os.environ.update(environment)
    install()
    _runs._command(folder, words, dict(os.environ), str(Path(folder) / "log.txt"))


def _processes_of(*words: str) -> list[int]:
    """Processes whose command line holds all of these words, but for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            told = os.fsdecode(path.read_bytes()).split("\0")
            if set(words) <= set(told) and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def _until_gone(run: str, patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while _processes_of(run):
        assert time.monotonic() < deadline, f"processes of {run} do not end"
        time.sleep(0.02)


WRITER = """
import pathlib, sys, threading
import _killing
from vlm_train.engine import checkpoints
folder, is_committed = pathlib.Path(sys.argv[1]), sys.argv[2] == "committed"
_killing.install()
def in_place(step):
    final = folder / checkpoints.name_of(step % 2)
    final.mkdir(exist_ok=True)
    for name in ("one", "two"):
        (final / name).write_bytes(bytes([step % 251]) * 5000)
        checkpoints.entry(final / name)
    files = {name: checkpoints.entry(final / name) for name in ("one", "two")}
    checkpoints.write_atomic(final / "manifest.json", checkpoints.json.dumps({"step": step % 2, "files": files}))
def committed(step):
    temporary = checkpoints.begin(folder, step)
    for name in ("one", "two"):
        (temporary / name).write_bytes(bytes([step % 251]) * 5000)
    checkpoints.commit(temporary, step, 2)
def write():
    for step in range(1, 50):
        (committed if is_committed else in_place)(step)
thread = threading.Thread(target=write, name="checkpoint")
thread.start()
thread.join()
"""
"""A process that only writes checkpoints, by the rules of `checkpoints.py`, or into folders that are used again."""


def run_writer(folder: Path, kind: str, number: int) -> None:
    """Starts `WRITER` and lets it die before its call `number`."""
    environment = {**os.environ, "KILL_AT_CALL": f"0:{number}:{folder / 'note'}"}
    here = Path(__file__).resolve().parent
    environment["PYTHONPATH"] = f"{here}:{here.parents[1]}"
    command = [sys.executable, "-c", WRITER, str(folder / "checkpoints"), kind]
    assert os.spawnve(os.P_WAIT, sys.executable, command, environment) == -signal.SIGKILL
