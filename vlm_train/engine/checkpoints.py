"""Checkpoints that can be trusted: a directory is a checkpoint only once it is complete, and is never written again.

Writing: `.step-N.tmp-*` -> files, flushed -> manifest.json with size and sha256 of each -> rename to `step-N` ->
LATEST by rename. Older ones go only after the new one has been read back and verified. Reading walks from the newest
to the oldest and takes the first that verifies, saying loudly what it passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from vlm_train.engine.rundir import write_atomic
from vlm_train.errors import CheckpointError
from vlm_train.log import get_logger

LOG = get_logger(__name__)
STATE = "state.ckpt"
"""A file, or the folder of a sharded strategy: a file of each rank and what lies where."""


def name_of(step: int) -> str:
    """Directory name of a checkpoint: sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint directory's name carries."""
    return int(path.name.removeprefix("step-"))


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; a temporary one is not among them."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def begin(folder: Path, step: int) -> Path:
    """A fresh temporary directory for step `step`; leftovers of killed writers are swept away."""
    for leftover in [*folder.glob(".step-*.tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".{name_of(step)}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, step: int, keep: int) -> Path:
    """Checksums, renames and publishes a fully written directory, then verifies it and retires older ones."""
    folder = temporary.parent
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    listing = {
        str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    write_atomic(temporary / "manifest.json", json.dumps({"version": 1, "step": step, "files": listing}, indent=1))
    final = folder / name_of(step)
    if final.exists():  # the same step, reached again after a rewind to an older checkpoint
        _retire(final)
    os.rename(temporary, final)
    _flush(folder)
    write_atomic(folder / "LATEST", final.name + "\n")
    verify(final)
    for old in committed(folder)[:-keep]:
        _retire(old)
    return final


def verify(path: Path) -> None:
    """Compares every file with the manifest. Raises CheckpointError that names the first bad one."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a committed checkpoint: {error}") from error
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path}: {name} has the wrong size", got=size, allowed=expected["size"])
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{path}: the checksum of {name} does not match its manifest")


def identity(path: Path) -> str:
    """16 hex digits that tell the content of a committed checkpoint, wherever it lies."""
    return _sha256(path / "manifest.json")[:16]


def newest(folder: Path, check: Callable[[Path], None] = verify) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none. Raises CheckpointError if all are bad."""
    failures = []
    for path in reversed(committed(folder)):
        try:
            check(path)
            return path
        except CheckpointError as error:
            LOG.warning("passing over a bad checkpoint: %s", error)
            failures.append(str(error))
    if failures:
        raise CheckpointError(
            "no checkpoint verifies", got="; ".join(failures), remedy="run.resume=never starts afresh"
        )
    return None


def retire_after(folder: Path, step: int) -> None:
    """Removes checkpoints beyond `step`: a run that goes on from there will write them anew."""
    for path in committed(folder):
        if step_of(path) > step:
            _retire(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retire(path: Path) -> None:
    """Rename first: a half-deleted directory must not look like a checkpoint."""
    trash = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)
