"""A run directory: what lies where, and how its files stay truthful when a run is killed at any instant.

metrics.jsonl, events.jsonl, data_errors.jsonl and evals/history.jsonl are append-only lines of JSON, one write per
line. On resume from step s, lines of the first, third and fourth that belong to later steps are removed before training
goes on, so a file never tells a step twice. A last line that is torn (the power failed, or the disk was full) is no row
for who reads, and is removed before another is written. Everything else is written beside its name and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_train.errors import CheckpointError, VlmError


class RunDirectory:
    """Paths and append-only records of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.data_errors = self.path / "data_errors.jsonl"
        self.evals = self.path / "evals"
        self.history = self.evals / "history.jsonl"
        self.media = self.path / "media"
        self.report = self.path / "report.html"
        self.hang = self.path / "hang"

    def create(self) -> None:
        """Makes the folders; an existing run keeps its files."""
        for folder in (self.path, self.checkpoints, self.evals, self.media):
            folder.mkdir(parents=True, exist_ok=True)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Appends one line to events.jsonl: what happened, when, and `fields`."""
        append_line(self.events, {"event": name, "time": round(time.time(), 3), **fields})

    def rewind(self, step: int) -> None:
        """Removes every record of a step beyond `step`, and what is torn. Nobody may write meanwhile."""
        for path in (self.metrics, self.data_errors, self.history):
            if path.exists():
                kept = [row for row in read_lines(path, "step") if row["step"] <= step]
                write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        for path in (self.events, *self.path.glob("time*.jsonl")):
            mend(path)

    def rewinds(self) -> list[dict[str, Any]]:
        """The `rewind` lines of events.jsonl, see `rewinds.py`."""
        return [row for row in read_lines(self.events, "event") if row["event"] == "rewind"]

    def time_of(self, rank: int) -> Path:
        """The ledger of one rank, see `ledger.py`."""
        return self.path / ("time.jsonl" if rank == 0 else f"time-rank-{rank}.jsonl")

    def last_step(self) -> int:
        """The last step of metrics.jsonl; 0 where it has no row."""
        return max((row["step"] for row in read_lines(self.metrics, "step")), default=0)

    def has_learned(self) -> bool:
        """Whether there is a record of a step, or a checkpoint, or stages, which have their own."""
        there = any(self.checkpoints.glob("step-*")) or any(self.path.glob("stage-*"))
        return there or self.last_step() > 0  # last, for it reads all records

    def reached(self) -> int:
        """The last step that was recorded before the run was taken up, 0 for none: it may lie beyond the checkpoint."""
        turns = [row for row in read_lines(self.events, "event") if row["event"] in ("start", "resume")]
        return int(turns[-1].get("reached", 0)) if turns else 0

    def is_finished(self) -> bool:
        """Whether the run reached its last step and was not taken up again since."""
        turns = [
            row["event"] for row in read_lines(self.events, "event") if row["event"] in ("start", "resume", "finished")
        ]
        return bool(turns) and turns[-1] == "finished"


def read_lines(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, each of which has these keys; a torn last line is not a row. Raises
    CheckpointError."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            row, why = None, f"is not JSON: {error}"
        else:
            why = f"is not a record with {' and '.join(keys)}" if keys else "is not a record"
        if not isinstance(row, dict) or not row.keys() >= set(keys):
            raise CheckpointError(f"{path} line {number} {why}", got=line[:80].decode(errors="backslashreplace"),
                                  remedy="mend or delete that line, or start a new run: run.resume=never")  # fmt: skip
        yield row


def mend(path: Path) -> None:
    """Removes a torn last line from a file of lines, if there is one."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """One line, one write; what a full disk has taken of it is taken back, and told. Raises VlmError."""
    data = (json.dumps(row) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(descriptor, data)
            if written != len(data):
                os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise VlmError(
            f"cannot append to {path}: {error.strerror}", remedy="free space, then run the same command: it resumes"
        ) from error


def write_atomic(path: Path, text: str) -> None:
    """Writes beside `path`, flushes to disk and renames: readers see the old or the new file, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise VlmError(
            f"cannot write {path}: {error.strerror}", remedy="free space or choose another run.dir"
        ) from error
