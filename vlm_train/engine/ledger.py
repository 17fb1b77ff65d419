"""Where the time of a run goes: every second of a process is booked to exactly one account.

| Account | What the process does |
|---|---|
| startup | from the process's start to the first batch: imports, building, loading a checkpoint, starting workers |
| compile | torch.compile at work, whenever that is |
| data_wait | waits for the loader |
| host_to_device | hands a batch to the device |
| compute | forward and backward |
| optimizer | clips, steps, averages |
| communication | waits in an exchange with other ranks, in the way of the step |
| validation | evaluates, and draws what was evaluated |
| checkpoint | agrees on signals and saves: as long as training waits for it |
| replay | trains steps that were trained before: after a kill those between the checkpoint and the end |
| overhead | what is left: records, the trainer's loop between its hooks, pictures, the report |

`idle` is no process's: the time between the last record of one and the start of the next, in a queue or with nobody who
started it; also that in which a process stood still until the watchdog ended it. *Goodput* is
the share of compute, optimizer and communication in all of a run's time, from the first start to the last record.

It is a state machine and no sampler: `switch` at each border books what has passed since the last one. What is booked
is what the host sees. It never waits for a GPU on its own account: kernels that are queued run on while the host goes
through the optimizer, and what the host then waits for, when it reads the loss, counts as compute. Exchanges on a GPU
are measured on its own clock (`callbacks/clock.py`). The reduction of gradients that DistributedDataParallel and FSDP2
run within a backward pass is part of compute: nobody sees where it ends there.

Rank 0 keeps its accounts in time.jsonl, rank N in time-rank-N.jsonl: cumulative rows, each of one process (`life`
1, 2, ...), so the last row of a life counts. What a process that was killed had booked since its last row is taken
from its heartbeat, where the next one runs on the same machine. Fields: `life rank began time step state seconds`, the
times in seconds since 1970, `step` the last one that ended, `state` running, ended or killed, `seconds` by account.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm_train.engine.heartbeat import ACCOUNTS, Heartbeat, page_of, read_beat, ticks_of
from vlm_train.engine.rundir import RunDirectory, append_line, read_lines
from vlm_train.errors import CheckpointError, VlmError
from vlm_train.log import get_logger

LOG = get_logger(__name__)

IDLE = "idle"
PRODUCTIVE = ("compute", "optimizer", "communication")
STEP_ACCOUNTS = frozenset(("data_wait", "host_to_device", "compute", "optimizer", "communication", "overhead"))
"""Of which a step consists; those of a step that was trained before are booked to replay."""

BEGAN = "VLM_TRAIN_BEGAN"
"""In the environment: when this command took the run up, where that is not when its process began."""

_PLACE = {name: place for place, name in enumerate(ACCOUNTS)}
_ROW_SECONDS = (10.0, 300.0)  # between two rows: at least, at most, and between these a hundredth of the process's age


class Ledger:
    """The accounts of this process. Without a path nothing is kept, without a page nobody is told.

    Args:
        path: the file of this rank.
        page: where other processes see this one.
        rank: this process among the ranks.
        life: the how manieth process of this rank in the run.
        began: when it began, seconds since 1970; None: now.
        reached: the last step that an earlier process trained.
    """

    def __init__(
        self,
        path: Path | None = None,
        page: Heartbeat | None = None,
        *,
        rank: int = 0,
        life: int = 1,
        began: float | None = None,
        reached: int = 0,
    ) -> None:
        self.path, self.page, self.rank, self.life, self.reached = path, page, rank, life, reached
        self.seconds = dict.fromkeys(ACCOUNTS, 0.0)
        self.account = "startup"
        self.step = self.ended = 0  # the step that is worked on, and the last that ended
        self._is_replayed = False
        now, self._since = time.time(), time.perf_counter()
        self.began = now if began is None else min(began, now)
        self.seconds["startup"] = now - self.began
        self._row_due = self._since + _ROW_SECONDS[0]

    def switch(self, account: str, collective: bytes = b"") -> str:
        """Another kind of work begins: books what has passed. Returns the kind before. `collective`: which exchange
        this rank now waits in."""
        now, before = time.perf_counter(), self.account
        booked = "replay" if self._is_replayed and before in STEP_ACCOUNTS else before
        total = self.seconds[booked] + now - self._since
        self.seconds[booked], self._since, self.account = total, now, account
        if self.page is not None:
            self.page.book(_PLACE[booked], total)
            self.page.move(self.step, _PLACE[account], collective)
        return before

    def move(self, seconds: float, source: str, target: str) -> None:
        """Books to `target` what was booked to `source`, as far as it is there; nothing of a step that is replayed,
        whose seconds are not told apart."""
        if self._is_replayed:
            return
        seconds = min(seconds, self.seconds[source])
        for account, change in ((source, -seconds), (target, seconds)):
            self.seconds[account] += change
            if self.page is not None:
                self.page.book(_PLACE[account], self.seconds[account])

    def at(self, step: int) -> None:
        """Step `step`, counted from 1, is worked on from now on; 0: none is."""
        self.switch(self.account)
        self.step, self._is_replayed = step, 0 < step <= self.reached

    def step_ended(self, step: int) -> None:
        """Step `step` has ended, with all that was asked for after it: from now on the next one's data is waited for.
        Writes a row when it is time to."""
        self.ended, self.reached = step, max(self.reached, step)
        self.at(step + 1)
        self.switch("data_wait")
        if self._since >= self._row_due:
            self.write("running")

    def write(self, state: str) -> None:
        """Appends a row. Raises VlmError when it cannot be written."""
        self.switch(self.account)
        age = time.time() - self.began
        self._row_due = self._since + min(max(age / 100, _ROW_SECONDS[0]), _ROW_SECONDS[1])
        if self.path is not None:
            seconds = {name: round(value, 6) for name, value in self.seconds.items()}
            append_line(self.path, {"life": self.life, "rank": self.rank, "began": round(self.began, 3),
                                    "time": round(time.time(), 3), "step": self.ended, "state": state,
                                    "seconds": seconds})  # fmt: skip


@contextmanager
def kept(run: RunDirectory, rank: int) -> Iterator[Ledger]:
    """The ledger of this process in a run, from the process's start on; its last row is written at the end. Takes over
    what an earlier process of the rank, which was killed, had not written."""
    path, page = run.time_of(rank), page_of(run.path, rank)
    try:
        before = _settle(path, page)
    except CheckpointError as error:  # training does not need it
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        LOG.warning("%s; the time before this start is left out, see %s", error.what, aside)
        before = []
    life = before[-1]["life"] + 1 if before else 1
    began = max(_began(), before[-1]["time"]) if before else _began()  # a process may take up a run twice
    beat = Heartbeat(page, rank=rank, life=life, began=began)
    beat.obey()
    ledger = Ledger(path, beat, rank=rank, life=life, began=began, reached=run.reached())
    ledger.switch("startup")
    try:
        yield ledger
    except BaseException:
        with suppress(VlmError):  # what ends the run is more than that this cannot be written either
            ledger.write("ended")
        beat.end_if_told()  # the error may only be that another rank has obeyed first
        raise
    else:
        ledger.write("ended")
    finally:
        beat.remove()


def _settle(path: Path, page: Path) -> list[dict[str, Any]]:
    """The lives before this one, after what the last of them had not written has been taken from its page."""
    rows, beat = lives_of(path), read_beat(page)
    told = rows[-1]["life"] if rows and rows[-1]["state"] != "running" else 0  # its last row is its last word
    if beat is not None and not beat.is_running and beat.life > told and beat.life >= len(rows):
        booked = sum(beat.seconds.values())
        row = {"life": beat.life, "rank": beat.rank, "began": beat.began, "time": beat.began + booked,
               "step": max(beat.step - 1, 0), "state": "killed", "seconds": beat.seconds}  # fmt: skip
        append_line(path, row)
    return lives_of(path)


def book_the_end(run: RunDirectory) -> None:
    """Books to overhead what has passed since the last row of rank 0, while its process ended. For the command, when it
    has nothing left but to say what came out."""
    lives, now = lives_of(run.time_of(0)), time.time()
    if not lives or lives[-1]["state"] != "ended":  # it was killed: nothing is known of its end
        return
    last = lives[-1]
    seconds = last["seconds"] | {"overhead": round(last["seconds"]["overhead"] + now - last["time"], 6)}
    append_line(run.time_of(0), {**last, "time": round(now, 3), "seconds": seconds})


def _began() -> float:
    """When this command took up the run: its first process's start, unless that has done something else before."""
    first = process_began(int(os.environ.get("VLM_TRAIN_PARENT", os.getpid())))
    return max(first, float(os.environ.get(BEGAN, "0")))


def process_began(process: int) -> float:
    """Seconds since 1970 at which a process began, to a hundredth; now, where the system does not tell (not Linux)."""
    ticks = ticks_of(process)
    if ticks is None:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The accounts of a run over all its processes, of one rank. `seconds`: by account, `idle` among them; `wall`: from
    the first start to the last record."""

    seconds: dict[str, float]
    wall: float
    num_lives: int

    @property
    def goodput(self) -> float:
        """The share of time in which the run learned something that it keeps."""
        return sum(self.seconds[name] for name in PRODUCTIVE) / self.wall if self.wall else 0.0

    def shares(self) -> dict[str, float]:
        """Account -> its part of all time."""
        return {name: value / self.wall if self.wall else 0.0 for name, value in self.seconds.items()}


def lives_of(path: Path) -> list[dict[str, Any]]:
    """The last row of each life."""
    return list({row["life"]: row for row in read_lines(path, "life", "began", "time", "state", "seconds")}.values())


def totals(lives: list[dict[str, Any]]) -> Totals | None:
    """Of the lives of one rank; None before the first row."""
    if not lives:
        return None
    seconds = {name: sum(row["seconds"].get(name, 0.0) for row in lives) for name in ACCOUNTS}
    gaps = pairwise(lives)
    seconds[IDLE] = sum(max(after["began"] - before["time"], 0.0) for before, after in gaps)
    return Totals(seconds=seconds, wall=lives[-1]["time"] - lives[0]["began"], num_lives=len(lives))


def columns(before: list[dict[str, Any]], ledger: Ledger) -> dict[str, float]:
    """What a logger shows of the run so far: `time/ACCOUNT`, shares of all time, and `time/goodput`. `before`: the
    lives before this one."""
    now = {"life": ledger.life, "began": ledger.began, "time": time.time(), "seconds": ledger.seconds}
    found = totals([*before, now])
    assert found is not None
    shares = {f"time/{name}": round(share, 5) for name, share in found.shares().items()}
    return {**shares, "time/goodput": round(found.goodput, 5)}
