"""Checkpoints that can be trusted: a directory is a checkpoint only once it is complete, and is never written again.

Writing: `.step-N.tmp-*` -> files, flushed -> manifest.json with size and sha256 of each -> rename to `step-N` ->
LATEST by rename. Older ones go only after the new one has been read back and verified. Reading walks from the newest
to the oldest and takes the first that verifies, saying loudly what it passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm_train.engine.rundir import write_atomic
from vlm_train.errors import CheckpointError
from vlm_train.log import get_logger

LOG = get_logger(__name__)
STATE = "state.ckpt"
"""A file, or the folder of a sharded strategy: a file of each rank and what lies where."""

_NAME = re.compile(r"step-\d+")

Entry = dict[str, Any]
"""What a manifest says of a file: `size` in bytes and `sha256`."""


def name_of(step: int) -> str:
    """Directory name of a checkpoint: sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint directory's name carries."""
    return int(path.name.removeprefix("step-"))


def place_of(path: Path) -> Path:
    """Where a checkpoint lies in its run: `path`, or what it points to where it has another name, as `latest` may."""
    place = Path(os.path.abspath(path))
    return place if _NAME.fullmatch(place.name) else path.resolve()


def named(folder: Path) -> list[Path]:
    """Directories with the name of a checkpoint, oldest first, damaged ones included; a temporary one has another."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; a temporary one is not among them."""
    return [path for path in named(folder) if (path / "manifest.json").is_file()]


def begin(folder: Path, step: int) -> Path:
    """A fresh temporary directory for step `step`; leftovers of killed writers are swept away."""
    for leftover in [*folder.glob(".step-*.tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".{name_of(step)}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    return temporary


def entry(file: Path) -> Entry:
    """What the manifest says of a file, which is on the disk afterwards and not only in the system's memory."""
    _flush(file)
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def commit(
    temporary: Path,
    step: int,
    keep: int,
    *,
    keep_every_steps: int | None = None,
    entries: Mapping[str, Entry] | None = None,
) -> Path:
    """Checksums, renames and publishes a fully written directory, then verifies it and retires older ones.

    `entries`: of files whose writers have made theirs already; a file that is listed and not there fails to verify.
    `keep`, `keep_every_steps`: see `retired`.
    """
    folder, known = temporary.parent, dict(entries or {})
    for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
        name = str(file.relative_to(temporary))
        known[name] = known.get(name) or entry(file)
    for inner in [path for path in temporary.rglob("*") if path.is_dir()]:
        _flush(inner)
    manifest = {"version": 1, "step": step, "files": dict(sorted(known.items()))}
    write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=1))
    _flush(temporary)
    final = folder / name_of(step)
    if final.exists():  # the same step, reached again after a rewind to an older checkpoint
        _retire(final)
    os.rename(temporary, final)
    _flush(folder)
    verify(final)
    write_atomic(folder / "LATEST", final.name + "\n")
    for old in retired(committed(folder), keep, keep_every_steps):
        _retire(old)
    return final


def retired(checkpoints: list[Path], keep: int, keep_every_steps: int | None = None) -> list[Path]:
    """Those of `checkpoints` (oldest first) that make room: all but the newest `keep`, and of these not one of a step
    that `keep_every_steps` divides, which stays for ever."""
    return [path for path in checkpoints[:-keep] if not keep_every_steps or step_of(path) % keep_every_steps]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where there is none, or one of something else."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        files, step = manifest["files"], manifest["step"]
        is_one = all({"size", "sha256"} <= expected.keys() for expected in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a committed checkpoint: {error}") from error
    if not is_one:
        raise CheckpointError(f"{path} is not a committed checkpoint: its manifest is damaged")
    place = place_of(path)
    if not _NAME.fullmatch(place.name):
        raise CheckpointError(f"{path} has not the name of a checkpoint", got=place.name, allowed="step-XXXXXXXX")
    if step != step_of(place):
        raise CheckpointError(f"{path}: the manifest is that of another step", got=repr(step), allowed=step_of(place))
    return manifest


def verify(path: Path, *, checksums: bool = True) -> None:
    """Compares every file with the manifest, or only the sizes. Raises CheckpointError that names the first bad one."""
    for name, expected in read_manifest(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path}: {name} has the wrong size", got=size, allowed=expected["size"])
        if checksums and _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{path}: the checksum of {name} does not match its manifest")


def identity(path: Path) -> str:
    """16 hex digits that tell the content of a committed checkpoint, wherever it lies."""
    return _sha256(path / "manifest.json")[:16]


def newest(folder: Path, check: Callable[[Path], None] = verify) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none. Raises CheckpointError if all are bad."""
    failures = []
    for path in reversed(named(folder)):
        try:
            check(path)
        except CheckpointError as error:
            LOG.warning("passing over a bad checkpoint: %s", error)
            failures.append(str(error))
            continue
        _compare_latest(folder, path)
        return path
    if failures:
        raise CheckpointError(
            "no checkpoint verifies", got="; ".join(failures), remedy="run.resume=never starts afresh"
        )
    return None


def _compare_latest(folder: Path, found: Path) -> None:
    """LATEST is for people and other programs. One that points nowhere means that somebody removed a checkpoint."""
    try:
        told = (folder / "LATEST").read_text().strip()
    except OSError:
        return
    if not (folder / told).is_dir():
        LOG.warning("%s names %s, which is not there; going by %s", folder / "LATEST", told or "nothing", found.name)


def retire_after(folder: Path, step: int) -> None:
    """Removes checkpoints beyond `step`: a run that goes on from there will write them anew."""
    for path in named(folder):
        if step_of(path) > step:
            _retire(path)


def prune(folder: Path, keep: int, keep_every_steps: int | None = None, *, dry: bool = False) -> list[Path]:
    """Removes what a run with this `keep` would have removed, and never the newest that verifies: the paths, oldest
    first. Damaged ones do not count among those that stay, and go too, where a newer one verifies. `dry`: says only.

    Raises CheckpointError where none verifies: then nothing is removed.
    """
    best = newest(folder)
    if best is None:
        return []
    good, bad = [], []
    for path in named(folder):
        try:
            verify(path)
            good.append(path)
        except CheckpointError:
            bad.append(path)
    gone = sorted([*retired(good, keep, keep_every_steps), *bad], key=step_of)
    gone = [path for path in gone if step_of(path) < step_of(best)]
    for path in [] if dry else gone:
        _retire(path)
    return gone


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
