"""The folder of a table of captions while it is made: whose it is, what is finished of it, and when it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm_train.data import row_folder
from vlm_train.data.home import write_whole
from vlm_train.data.recaption_table import facts_of
from vlm_train.errors import DataError

SETTINGS, ERRORS = "settings.json", "errors.jsonl"
_COUNTS = (
    "num_original", "num_original_dropped", "num_synthetic", "num_synthetic_dropped", "num_empty", "num_repeated",
    "num_without", "num_skipped",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recaptioned:
    """A table that is finished: its folder, and what provenance.json says. `already_there`: it had been before."""

    directory: Path
    facts: dict[str, Any]
    already_there: bool


@contextmanager
def claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Holds a folder for this process and these settings, plain JSON.

    Raises:
        DataError: it cannot be written, another process holds it, or it holds something else or a table by other
            settings.
    """
    try:
        lock = _locked(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written", got=error, remedy="choose another folder, or make room") from error
    with lock:  # it lasts as long as it is open
        if not (out / SETTINGS).is_file():
            write_whole(out / SETTINGS, row_folder.text_of(settings))
        _check_settings(out, settings)
        for scratch in out.glob(".*.tmp"):  # of a process that was killed
            scratch.unlink()
        yield


def _locked(out: Path) -> IO[str]:
    out.mkdir(parents=True, exist_ok=True)
    present = sorted(name for name in os.listdir(out) if not name.startswith("."))
    if present and SETTINGS not in present:
        raise DataError(f"{out} is not empty and holds no table of captions", got=", ".join(present[:5]),
                        remedy="choose another folder")  # fmt: skip
    lock = open(out / ".lock", "a")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise DataError(f"another process is writing {out}", remedy="wait for it to end") from error
    return lock


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    try:
        found: dict[str, Any] = json.loads((out / SETTINGS).read_text())
    except ValueError as error:
        raise DataError(f"{out / SETTINGS} is damaged", got=error, remedy=f"remove {out}") from error
    differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if differing:
        raise DataError(
            f"{out} holds a table of captions that was made with other settings",
            got={key: settings.get(key) for key in differing},
            allowed={key: found.get(key) for key in differing},
            remedy="choose another folder, or remove this one",
        )


def finished(out: Path) -> Recaptioned | None:
    """The table, where it is whole already."""
    try:
        return Recaptioned(out, json.loads((out / row_folder.NAME).read_text()), already_there=True)
    except FileNotFoundError:
        return None


def finish(out: Path, settings: dict[str, Any], names: Sequence[str]) -> Recaptioned:
    """Adds up the parts, whose files are `names`, and writes what makes the table whole.

    Raises:
        DataError: it has no row.
    """
    parts = [facts_of(out / name) or {} for name in names]
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    for part in parts:
        counts.update(part["counts"])
    errors = [error for part in parts for error in part["errors"]]
    num_rows = sum(part["num_rows"] for part in parts)
    if not num_rows:
        raise DataError(
            "not one picture could be captioned",
            got=errors[0] if errors else "no samples",
            allowed="samples with a picture",
            remedy="vlm-train data verify SHARDS --mode full",
        )
    write_whole(out / ERRORS, "".join(json.dumps(error) + "\n" for error in errors).encode())
    listed = [
        {"file": name, "num_rows": part["num_rows"], "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest()}
        for name, part in zip(names, parts, strict=True)
    ]
    skipped = dict(sorted(Counter(error["reason"] for error in errors).items()))
    facts = {**settings, **counts, "num_rows": num_rows, "skipped": skipped, "parts": listed}
    write_whole(out / row_folder.NAME, row_folder.text_of(facts))
    return Recaptioned(out, facts, already_there=False)
