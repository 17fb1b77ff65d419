"""A process beside the ranks of a machine that ends a run which stands still, and says who did not come.

The first rank of each machine starts it, and it dies with that rank. It reads heartbeats (`heartbeat.py`), decides by
the rules of `hang.py`, and then: asks every rank for the stacks of its threads, and the loader's workers too
(faulthandler answers by a signal, in C, also where the interpreter is held); writes them to hang/rank-N.txt, one
sentence and a `hang` line to events.jsonl; and tells the ranks to end with EXIT_HANG. One that does not in
END_SECONDS is killed. `trainer.hang_seconds=0` starts none.

It is a process and not a thread, because a thread of a rank needs the interpreter that may be held by what hangs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_train.engine import hang
from vlm_train.engine.heartbeat import EXIT_HANG, Beat, order_end, page_of, read_beats
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.stops import SIGNALS
from vlm_train.log import get_logger

LOG = get_logger("vlm_train.engine.watchdog")  # this module runs as __main__
DUMP = int(signal.SIGRTMIN) + 5
"""Asks a rank for its stacks; of the signals that nobody else uses."""
STACK_SECONDS = 5.0
END_SECONDS = 5.0
PAUSE_SECONDS = 10.0  # between two looks, of which it takes one each second: this process was stopped itself
_PR_SET_PDEATHSIG = 1


@contextmanager
def watched(run: RunDirectory, config: Any, world_size: int) -> Iterator[None]:
    """While a rank trains: it answers for its stacks, and the first of a machine has a watchdog."""
    rank = int(os.environ.get("RANK", "0"))
    stacks = open(stacks_of(run.path, rank), "wb")  # noqa: SIM115
    faulthandler.register(DUMP, file=stacks, all_threads=True)
    process = _start(run.path, config, world_size)
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()
        faulthandler.unregister(DUMP)
        stacks.close()
        stacks_of(run.path, rank).unlink(missing_ok=True)


def stacks_of(run: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return page_of(run, rank).with_suffix(".stacks")


def _start(run: Path, config: Any, world_size: int) -> subprocess.Popen[bytes] | None:
    seconds = config.trainer.hang_seconds
    if int(os.environ.get("LOCAL_RANK", "0")) != 0 or seconds == 0:
        return None
    is_remote = "://" in json.dumps([str(config.data.train.shards), str(config.data.val.shards)])
    patience = hang.Patience(
        seconds=seconds,
        retries=config.data.retry_seconds if is_remote else 0.0,
        is_whole=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == world_size,
    )
    command = [sys.executable, "-m", "vlm_train.engine.watchdog", str(run), str(os.getpid())]
    # an own session: signals for the run are not for it
    return subprocess.Popen([*command, json.dumps(asdict(patience))], stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Watches until the parent is gone, or ends the ranks."""
    run, parent, patience = RunDirectory(arguments[0]), int(arguments[1]), hang.Patience(**json.loads(arguments[2]))
    for number in (*SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals every process of a job; the ranks have to save yet
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pace = hang.Pace()
    since = now = time.monotonic()
    interval = min(1.0, (patience.seconds or hang.SECONDS) / 10)
    while os.getppid() == parent:
        time.sleep(interval)
        beats, last, now = read_beats(run.path), now, time.monotonic()
        if beats:
            pace.see(beats[0].step, now)
        if now - last > PAUSE_SECONDS or (beats and all(_state(beat.process) in "Tt" for beat in beats)):
            since = now  # the scheduler has stopped everything, or the user the ranks
        if hang.stands_still(beats, patience, pace, now, since):
            end(run, beats, patience)
            return EXIT_HANG
    return 0


def end(run: RunDirectory, beats: Sequence[Beat], patience: hang.Patience) -> None:
    """Says what is the matter, and ends the ranks. This process goes with its parent; whoever started the ranks ends
    what is left then."""
    now, stacks = time.monotonic(), _stacks(run, beats)
    ranks = [hang.position(beat, stacks[beat.rank], now) for beat in beats]
    told = hang.sentence(ranks, is_whole=patience.is_whole)
    LOG.error("%s\n  stacks:  %s\n  remedy:  run the same command again: it resumes", told, run.hang)
    run.event("hang", {"step": max(beat.step for beat in beats), "sentence": told, "ranks": ranks})
    for beat in beats:  # all of them before the first ends: who loses its connection must know why
        order_end(page_of(run.path, beat.rank))
    _kill_after([beat.process for beat in beats], END_SECONDS)


def _stacks(run: RunDirectory, beats: Sequence[Beat]) -> dict[int, str]:
    """rank -> what its threads were at. Writes that to hang/rank-N.txt, with what its workers were at behind it."""
    run.hang.mkdir(exist_ok=True)
    found = {}
    for beat in beats:
        path = stacks_of(run.path, beat.rank)
        found[beat.rank] = _ask(beat.process, path)
        parts = [f"# rank {beat.rank}, process {beat.process}\n{found[beat.rank]}"]
        parts += [f"# a process that it started, {child}\n{_ask(child, path)}" for child in _children(beat.process)]
        (run.hang / f"rank-{beat.rank}.txt").write_text("\n".join(parts))
    return found


def _ask(process: int, path: Path) -> str:
    """Has a process append its stacks to `path`, and returns them; empty where it does not answer."""
    if not _answers(process):
        return ""
    before, deadline = path.stat().st_size, time.monotonic() + STACK_SECONDS
    os.kill(process, DUMP)
    size, last = before, -1
    while time.monotonic() < deadline and not before < size == last:
        time.sleep(0.1)
        last, size = size, path.stat().st_size
    return path.read_bytes()[before:].decode(errors="replace")


def _answers(process: int) -> bool:
    """Whether a process has a handler for DUMP; without one it would be ended by it."""
    mask = 1 << (DUMP - 1)
    return any(line.startswith("SigCgt:") and int(line.split()[1], 16) & mask for line in _status(process))


def _state(process: int) -> str:
    """The letter of the system for what a process does, T where it is stopped."""
    return next((line.split()[1] for line in _status(process) if line.startswith("State:")), "X")


def _status(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return []


def _children(process: int) -> Iterable[int]:
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        yield from map(int, path.read_text().split())


def _kill_after(processes: Sequence[int], seconds: float) -> None:
    """Waits for processes to be gone; those that are not are killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(_state(process) not in "XZ" for process in processes):
        time.sleep(0.1)
    for process in processes:
        if _state(process) not in "XZ":
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
