"""What `vlm-train watch` knows of a run: its files, read again as they grow, and no torch.

A viewer shows what it can: a line that is no record is left out and counted, a config that nobody can read is told.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm_train.engine import checkpoints
from vlm_train.engine.heartbeat import ACCOUNTS, Beat, read_beats
from vlm_train.engine.ledger import Totals, totals
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.scores import Score, scores_of

Row = dict[str, Any]
Rows = list[Row]
NUM_RATES = 20
"""Steps over which samples per second are averaged."""
LARGEST = 1e100
"""No record of a run holds a number beyond it, and sums and quotients of smaller ones stay finite."""
NO_RECORD = (AttributeError, TypeError, ValueError, LookupError, ArithmeticError, OSError, RecursionError)
"""What may come of reading something else as a record."""

_STATUS_AFTER = {
    "start": "ended", "resume": "ended", "interrupted": "stopped", "failed": "failed", "finished": "finished",
    "requeue": "waiting", "requeue_refused": "stopped",
}  # fmt: skip
"""What a run is after an event when no process has it."""


@dataclass(slots=True)
class Growing:
    """The records of an append-only file; a look reads what has come since the last one. A file that was written anew,
    as a resumed run's metrics are, is read from its beginning.

    Args:
        path: the file.
        read: makes a record of the JSON value of a line; raises one of `NO_RECORD` where it is none.
        rows: the records so far.
        num_bad: lines so far that are none.
    """

    path: Path
    read: Callable[[Any], Row]
    rows: Rows = field(default_factory=list)
    num_bad: int = 0
    _offset: int = 0
    _file: int = 0

    def look(self) -> Rows:
        """All rows so far; a line without its end is none yet."""
        if not self.path.exists():
            return self.rows
        with open(self.path, "rb") as file:
            status = self.path.stat()
            if status.st_ino != self._file or status.st_size < self._offset:
                self.rows, self.num_bad, self._offset, self._file = [], 0, 0, status.st_ino
            file.seek(self._offset)
            content = file.read()
        for line in content.split(b"\n")[:-1]:
            try:
                self.rows.append(self.read(json.loads(line.decode())))
            except NO_RECORD:
                self.num_bad += 1
        self._offset += content.rfind(b"\n") + 1
        return self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A run at one moment. `status`: running, waiting (for a job that was submitted, or queued again), finished,
    stopped (it was asked to), failed (it ended by an error), ended (nobody works on it, though it is not done);
    `num_steps`: None where `config_error` says why nobody knows; `evals`: name -> (step, newest scores); `latest`: the
    newest checkpoint, its step and its age in seconds; `silent`: seconds since its last record; `num_bad`: file ->
    lines that were left out; `eta`: seconds, None where nobody trains or the pace is not known."""

    name: str
    status: str
    num_steps: int | None
    config_error: str
    metrics: Rows
    events: Rows
    evals: dict[str, tuple[int, list[Score]]]
    time: Totals | None
    beats: list[Beat]
    latest: tuple[int, float] | None
    silent: float | None
    num_bad: dict[str, int]

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come by itself."""
        return self.status not in ("running", "waiting")

    @property
    def step(self) -> int:
        """The last that was recorded."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def rate(self) -> float:
        """Samples per second over the last steps, as their times tell; 0 where none is known."""
        rates = [row["samples_per_second"] for row in self.metrics[-NUM_RATES:] if row["samples_per_second"] > 0]
        return len(rates) / sum(1 / rate for rate in rates) if rates else 0.0

    @property
    def eta(self) -> float | None:
        """With evaluations and checkpoints as far as they have cost until now."""
        if not self.rate or not self.step or self.num_steps is None or self.status != "running":
            return None
        samples = self.metrics[-1]["samples"] / self.step
        return (self.num_steps - self.step) * samples / self.rate * self._surcharge()

    def _surcharge(self) -> float:
        if self.time is None:
            return 1.0
        beside = self.time.seconds["validation"] + self.time.seconds["checkpoint"]
        steps = sum(self.time.seconds[name] for name in ("data_wait", "host_to_device", "compute", "optimizer",
                                                         "communication", "replay", "overhead"))  # fmt: skip
        return 1 + beside / steps if steps else 1.0


class Reader:
    """Looks at one run again and again; of a run in stages at the stage that it has come to."""

    def __init__(self, run: RunDirectory) -> None:
        self.top, self._turns_of_top = run, Growing(run.events, _event)
        self._follow(run)

    def _follow(self, run: RunDirectory) -> None:
        self.run = run
        self._metrics, self._time = Growing(run.metrics, _metrics), Growing(run.time_of(0), _life)
        self._events, self._evals = Growing(run.events, _event), Growing(run.history, _scores)

    def look(self) -> View:
        """The run now."""
        run = RunDirectory(
            max((path.parent for path in self.top.path.glob("stage-*/config.yaml")), default=self.top.path)
        )
        if run.path != self.run.path:
            self._follow(run)
        files = (self._metrics, self._events, self._time, self._evals)
        metrics, events, lives, evals = (file.look() for file in files)
        num_steps, config_error = _num_steps(run)
        records = [file.path.stat().st_mtime for file in files[:3] if file.path.exists()]
        return View(
            name=str(run.path),
            status=self._status(events),
            num_steps=num_steps,
            config_error=config_error,
            metrics=metrics,
            events=events,
            evals={row["name"]: (row["step"], row["scores"]) for row in evals},
            time=totals(list({row["life"]: row for row in lives}.values())),
            beats=read_beats(run.path),
            latest=_latest(run),
            silent=time.time() - max(records) if records else None,
            num_bad={str(file.path.relative_to(run.path)): file.num_bad for file in files if file.num_bad},
        )

    def _status(self, events: Rows) -> str:
        submitted, (status, since) = submission(self.top), _turn(events)
        if status == "finished" and self.run.path != self.top.path:  # a stage, behind which others may come
            status, since = _turn(self._turns_of_top.look())
            status = "waiting" if status != "finished" and submitted is not None else status
        if status == "finished":
            return status
        if _is_held(self.run) or _is_held(self.top):
            return "running"
        return "waiting" if submitted is not None and submitted > since else status


def submission(run: RunDirectory) -> float | None:
    """When the newest job of a run was written, in seconds since 1970; None where there is none."""
    return max((path.stat().st_mtime for path in run.path.glob("submit/*/job.sbatch")), default=None)


def _turn(events: Rows) -> tuple[str, float]:
    """What the last event that says so makes of a run that no process has, and when that was."""
    turns = [row for row in events if row["event"] in _STATUS_AFTER]
    return (_STATUS_AFTER[turns[-1]["event"]], turns[-1]["time"]) if turns else ("ended", 0.0)


def _is_held(run: RunDirectory) -> bool:
    """Whether a process has the run's lock, on any machine whose file system keeps locks in common."""
    try:
        with open(run.path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _num_steps(run: RunDirectory) -> tuple[int | None, str]:
    """`trainer.max_steps` of a config, or None and why nobody can tell; no reason where the config is yet to come."""
    try:
        num_steps = int(_number(yaml.safe_load(run.config.read_bytes())["trainer"]["max_steps"]))
    except FileNotFoundError:
        return None, ""
    except (TypeError, LookupError):
        return None, "it has no trainer.max_steps"
    except (OSError, ValueError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
        return None, " ".join(str(error).split())
    return (num_steps, "") if num_steps > 0 else (None, f"trainer.max_steps is {num_steps}")


def _latest(run: RunDirectory) -> tuple[int, float] | None:
    for path in reversed(checkpoints.committed(run.checkpoints)):
        try:
            return checkpoints.step_of(path), time.time() - (path / "manifest.json").stat().st_mtime
        except OSError:  # it has just made room for a newer one
            continue
    return None


def _metrics(row: Any) -> Row:
    numbers = {name: _number(row[name]) for name in ("samples", "lr", "data_wait")}
    numbers |= {name: _number(row.get(name) or 0.0) for name in ("samples_per_second", "mfu")}
    measured = {name: _number(row[name], finite=False) for name in ("loss", "grad_norm")}
    return {"step": int(_number(row["step"])), **numbers, **measured}


def _event(row: Any) -> Row:
    """`sentence`: what it says for people; empty where it has only `fields`, as JSON."""
    moment = _number(row["time"])
    time.localtime(moment)  # raises where it is none
    sentence = next((row[key] for key in ("sentence", "error") if isinstance(row.get(key), str)), "")
    fields = {key: value for key, value in row.items() if key not in ("event", "time", "ranks")}
    return {"event": _text(row["event"]), "time": moment, "sentence": sentence, "fields": json.dumps(fields)}


def _life(row: Any) -> Row:
    seconds = {name: _number(row["seconds"].get(name, 0.0)) for name in ACCOUNTS}
    return {"life": _number(row["life"]), "began": _number(row["began"]), "time": _number(row["time"]),
            "seconds": seconds}  # fmt: skip


def _scores(row: Any) -> Row:
    return {"name": _text(row["name"]), "step": int(_number(row["step"])), "scores": scores_of(row)}


def _number(value: Any, *, finite: bool = True) -> float:
    """Raises ValueError where it is no number that can be; those that are not finite only where `finite` is false."""
    number = float(value)
    if not (abs(number) <= LARGEST or (not finite and not math.isfinite(number))):
        raise ValueError(f"{value} is no number of a record")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value} is no text")
    return value
