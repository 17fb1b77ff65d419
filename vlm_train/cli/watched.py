"""What `vlm-train watch` knows of a run: its files, read again as they grow, and no torch."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm_train.engine import checkpoints
from vlm_train.engine.heartbeat import Beat, read_beats
from vlm_train.engine.ledger import Totals, lives_of, totals
from vlm_train.engine.rundir import RunDirectory, read_lines

Rows = list[dict[str, Any]]
NUM_RATES = 20
"""Steps over which samples per second are averaged."""


@dataclass(slots=True)
class Growing:
    """The rows of an append-only file; a look reads what has come since the last one. A file that was written anew, as
    a resumed run's metrics are, is read from its beginning."""

    path: Path
    rows: Rows = field(default_factory=list)
    _offset: int = 0
    _file: int = 0

    def look(self) -> Rows:
        """All rows so far; a line without its end is none yet."""
        if not self.path.exists():
            return self.rows
        with open(self.path, "rb") as file:
            status = self.path.stat()
            if status.st_ino != self._file or status.st_size < self._offset:
                self.rows, self._offset, self._file = [], 0, status.st_ino
            file.seek(self._offset)
            content, end, _ = file.read().rpartition(b"\n")
        self.rows += [json.loads(line) for line in content.splitlines()]
        self._offset += len(content) + len(end)
        return self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A run at one moment. `status`: running, finished, stopped (it was asked to), ended (nobody works on it, though
    it is not done); `latest`: the newest checkpoint, its step and its age in seconds; `silent`: seconds since its
    last record; `eta`: seconds, None where the pace is not known."""

    name: str
    status: str
    num_steps: int
    metrics: Rows
    events: Rows
    evals: dict[str, dict[str, Any]]
    time: Totals | None
    beats: list[Beat]
    latest: tuple[int, float] | None
    silent: float | None

    @property
    def step(self) -> int:
        """The last that was recorded."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def rate(self) -> float:
        """Samples per second over the last steps, as their times tell; 0 where none is known."""
        rates = [row["samples_per_second"] for row in self.metrics[-NUM_RATES:] if row["samples_per_second"]]
        return len(rates) / sum(1 / rate for rate in rates) if rates else 0.0

    @property
    def eta(self) -> float | None:
        """With evaluations and checkpoints as far as they have cost until now."""
        if not self.rate or self.status == "finished":
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
        self.top = run
        self._follow(run)

    def _follow(self, run: RunDirectory) -> None:
        self.run, self._metrics, self._events = run, Growing(run.metrics), Growing(run.events)

    def look(self) -> View:
        """The run now."""
        run = RunDirectory(
            max((path.parent for path in self.top.path.glob("stage-*/config.yaml")), default=self.top.path)
        )
        if run.path != self.run.path:
            self._follow(run)
        events = self._events.look()
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        records = [path.stat().st_mtime for path in (run.metrics, run.events, run.time_of(0)) if path.exists()]
        return View(
            name=str(run.path),
            status=_status(run, events),
            num_steps=config["trainer"]["max_steps"],
            metrics=self._metrics.look(),
            events=events,
            evals=_evals(run),
            time=totals(lives_of(run.time_of(0))),
            beats=read_beats(run.path),
            latest=_latest(run),
            silent=time.time() - max(records) if records else None,
        )


def _status(run: RunDirectory, events: Rows) -> str:
    turns = [row["event"] for row in events if row["event"] in ("start", "resume", "interrupted", "finished")]
    if turns[-1:] == ["finished"]:
        return "finished"
    if _is_held(run):
        return "running"
    return "stopped" if turns[-1:] == ["interrupted"] else "ended"


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


def _latest(run: RunDirectory) -> tuple[int, float] | None:
    found = checkpoints.committed(run.checkpoints)
    if not found:
        return None
    return checkpoints.step_of(found[-1]), time.time() - (found[-1] / "manifest.json").stat().st_mtime


def _evals(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """The newest result of each evaluator."""
    return {row["name"]: row for row in read_lines(run.history)}
