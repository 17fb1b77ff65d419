"""When a run stands still, and what is said about it: rules and words of the watchdog, without a process.

A rank stands still when it has come to no border between two kinds of work (`heartbeat.py`) for longer than what it
does may take. The run does when every rank of the machine stands still: while one of them works, those that wait for
it in an exchange are right to.
"""

from __future__ import annotations

import re
import sysconfig
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vlm_train.engine.heartbeat import Beat

STEPS = 20.0  # median steps without progress, and
SECONDS = 90.0  # at least so long, before a rank stands still in a step: a file server may take a minute to come back
LONG = 30.0  # times as long for what has no borders inside, and until the median of a few steps is known
FEW_STEPS = 3
# where a rank is at no step, it begins or ends, and that is long too
LONG_ACCOUNTS = frozenset(("startup", "compile", "validation", "checkpoint"))
BACKWARD = "_engine_run_backward"  # the function of torch that a rank waits in while gradients are reduced
GRADIENTS = "the reduction of the gradients"

_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)')
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a rank may stand still.

    `seconds`: of `trainer.hang_seconds`, None for STEPS and SECONDS; `retries`: how long a server that does not answer
    is asked again; `is_whole`: whether all ranks are on this machine. Where they are not, a rank that waits may wait
    for one of which only another watchdog knows whether it works.
    """

    seconds: float | None
    retries: float
    is_whole: bool

    def of(self, beat: Beat, step_seconds: float | None) -> float:
        """Seconds; `step_seconds`: the median, None while too few steps are known."""
        plain = self.seconds if self.seconds is not None else max(STEPS * (step_seconds or 0.0), SECONDS)
        is_long = step_seconds is None or beat.step == 0 or beat.account in LONG_ACCOUNTS
        if is_long or (beat.collective and not self.is_whole):
            return LONG * plain
        return max(plain, self.retries + SECONDS) if self.retries and beat.account == "data_wait" else plain


class Pace:
    """The median time of a step, from what is seen of rank 0's page now and then."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=101)
        self._seen: tuple[int, float] | None = None
        self._num_steps = 0

    def see(self, step: int, now: float) -> None:
        """Step `step` is worked on at `now`; 0 is none."""
        if step == 0 or self._seen is None or step < self._seen[0]:
            self._seen = (step, now) if step else None
        elif step > self._seen[0]:
            done = step - self._seen[0]
            self._times.append((now - self._seen[1]) / done)
            self._num_steps, self._seen = self._num_steps + done, (step, now)

    @property
    def step_seconds(self) -> float | None:
        """None while fewer than FEW_STEPS have been seen."""
        return median(self._times) if self._num_steps >= FEW_STEPS else None


def stands_still(beats: Sequence[Beat], patience: Patience, pace: Pace, now: float, since: float) -> bool:
    """Whether the run does. `since`: before it nothing counts, for the machine or the user had stopped the ranks."""
    return bool(beats) and all(now - max(beat.moved, since) > patience.of(beat, pace.step_seconds) for beat in beats)


def position(beat: Beat, stack: str, now: float) -> dict[str, Any]:
    """A rank as the `hang` line of events.jsonl tells it."""
    frames = frames_of(stack)
    collective = beat.collective
    if not collective and frames and frames[0][2] == BACKWARD:
        collective = GRADIENTS
    return {
        "rank": beat.rank,
        "step": beat.step,
        "account": beat.account,
        "collective": collective or None,
        "where": place(frames),
        "seconds": round(now - beat.moved, 1),
    }


def sentence(ranks: Sequence[Mapping[str, Any]], *, is_whole: bool) -> str:
    """Which rank is missing, in what the others wait, and where it is; `ranks`: of `position`."""
    waiting = [rank for rank in ranks if rank["collective"]]
    missing = [rank for rank in ranks if not rank["collective"]]
    if waiting and missing:
        meeting = max(waiting, key=lambda rank: rank["step"])
        has, wait = "has" if len(missing) == 1 else "have", "waits" if len(waiting) == 1 else "wait"
        return (
            f"{_ranks(missing)} {has} not reached {meeting['collective']} of step {meeting['step']}, in which "
            f"{_ranks(waiting)} {wait}: {'; '.join(_stands(rank) for rank in missing)}"
        )
    places = {(rank["collective"], rank["step"]) for rank in waiting}
    if len(places) > 1:
        return "the ranks wait in different exchanges: " + "; ".join(
            f"rank {rank['rank']} in {rank['collective']} of step {rank['step']}" for rank in waiting
        )
    if waiting and (len(waiting) > 1 or not is_whole):
        name, step = next(iter(places))
        why = "the network between them stands still" if is_whole else "a rank of another machine has not reached it"
        return f"all ranks of this machine wait in {name} of step {step}: {why}"
    return "the run stands still: " + "; ".join(_stands(rank) for rank in ranks)


def frames_of(stack: str) -> list[tuple[str, int, str]]:
    """(file, line, function) of the thread that trains, innermost first, of what faulthandler wrote."""
    threads = re.split(r"\n(?=(?:Current thread|Thread) 0x)", stack)
    chosen = [thread for thread in threads if "vlm_train/training.py" in thread] or threads[-1:]
    return [(m["file"], int(m["line"]), m["function"]) for m in map(_FRAME.fullmatch, chosen[0].split("\n")) if m]


def place(frames: Sequence[tuple[str, int, str]]) -> str | None:
    """The innermost line that is no library's, in the package's own words where it is ours; None for no stack."""
    if not frames:
        return None
    own = [frame for frame in frames if not frame[0].startswith((*_LIBRARIES, "<"))]
    file, line, function = (own or frames)[0]
    root = str(Path(__file__).resolve().parents[2])
    return f"{file.removeprefix(root + '/')}, line {line}, in {function}"


def _stands(rank: Mapping[str, Any]) -> str:
    where = rank["where"] or "a line that it does not tell: its process is stopped, or waits in the kernel"
    step = f" of step {rank['step']}" if rank["step"] else ""
    return f"rank {rank['rank']} is in {rank['account']}{step}, at {where}, for {rank['seconds']:.0f} s"


def _ranks(ranks: Iterable[Mapping[str, Any]]) -> str:
    names = [str(rank["rank"]) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"
