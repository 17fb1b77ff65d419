"""W&B's folder of an offline run: an id that W&B takes, whether its file holds what was logged, and its place.

W&B writes the file in a process of its own, and says nothing where the disk of that is full. So a new folder is written
beside its place, read back, and only then takes the place of the one before.

The file is a log of LevelDB's kind (https://github.com/google/leveldb/blob/main/doc/log_format.md): blocks of 32 KiB,
in them parts with checksum, length and kind (1 a whole record, 2 its first part, 3 a middle one, 4 its last); a record
is a message of W&B's protocol. Seven bytes of W&B's own stand before all.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import VlmError

REFUSED = ":;,#?/'\\%"
"""Characters that W&B takes in no id."""
LONGEST = 128
"""Of an id, in bytes: it is part of the names of files."""

_BLOCK, _PART, _OWN = 32768, struct.Struct("<IHB"), 7


def id_of(run_id: str) -> str:
    """W&B's id of a run: `run_id` itself where W&B takes that, else what is left of it with eight digits of its hash,
    the same each time."""
    kept = "".join("-" if char in REFUSED or not char.isprintable() else char for char in run_id).strip()
    if kept == run_id and 0 < len(kept.encode()) <= LONGEST:
        return run_id
    digits = hashlib.sha256(os.fsencode(run_id)).hexdigest()[:8]
    return f"{kept.encode()[: LONGEST - 9].decode(errors='ignore')}-{digits}"


def records(path: Path) -> Iterator[bytes]:
    """The records of a file, up to its end or to where it was cut."""
    content, place, whole = path.read_bytes(), _OWN, b""
    while place + _PART.size <= len(content):
        if _BLOCK - place % _BLOCK < _PART.size:  # too little room for another part
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = _PART.unpack_from(content, place)
        place += _PART.size
        if kind == 0 or place + length > len(content):
            return
        whole += content[place : place + length]
        place += length
        if kind in (1, 4):
            yield whole
            whole = b""


def num_rows(path: Path) -> int:
    """The rows that a file holds; 0 where it has not come to its end."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when imported

    record, num, kind = Record(), 0, None
    for content in records(path):
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        num += kind == "history"
    return num if kind == "exit" else 0


def scratch(run: RunDirectory) -> Path:
    """A fresh folder for W&B to write into; leftovers of killed writers are swept away."""
    for leftover in run.path.glob(".wandb-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = run.path / f".wandb-{os.getpid()}"
    folder.mkdir()
    return folder


def publish(run: RunDirectory, made: Path, run_id: str, num: int) -> None:
    """Moves what W&B has written in `scratch` to wandb/ in the run's folder; older ones of the same id then go.

    Args:
        run: its folder.
        made: W&B's folder, offline-run-TIME-ID.
        run_id: W&B's id.
        num: how many rows it was given.

    Raises:
        VlmError: it has fewer, or is cut; then the one before stays.
    """
    files = list(made.glob("run-*.wandb"))
    found = num_rows(files[0]) if files else 0
    if found < num:
        shutil.rmtree(made.parent.parent, ignore_errors=True)
        raise VlmError("W&B has not written the whole run", got=f"{found} of {num} rows", allowed="all of them",
                       remedy=f"free space, then vlm-train sync {run.path} --mode offline")  # fmt: skip
    place = run.path / "wandb" / made.name
    before = set(run.path.glob(f"wandb/offline-run-*-{glob.escape(run_id)}"))
    if place in before:  # it was made within the same second
        shutil.rmtree(place)
    os.rename(made, place)
    for old in before - {place}:
        shutil.rmtree(old)
    shutil.rmtree(made.parent.parent, ignore_errors=True)
