"""The folder that a manifest lies in: what its files are called, what its root.json says, and how both change.

Nothing in it is believed that does not hold together. An entry of root.json that is not whole, or whose files are
missing or cut off, is as good as none: its shard is indexed again. Files are written under another name, flushed and
renamed. index.bin only grows, or is replaced after root.json was taken away; so a root.json that is there before and
after the index is mapped fits what was mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.files import Stat
from vlm_train.data.formats.base import ENTRY
from vlm_train.locations import identity, is_remote, name_of

VERSION = 5
ROOT = "root.json"
INDEX = "index.bin"

Entry = dict[str, Any]
"""Of a shard in root.json: size and version of the file; start and num_samples of its rows in index.bin; content
(sha256 over their uids), index_sha256 (over their records in it); num_errors; ignored; files (of each of the shard's
files that there is, by ending, size and sha256)."""

ENDINGS = ("parquet", "errors", "records")
"""Of a shard's files: its part; what was left out of it; what a folder's table says."""

_COUNTS = ("size", "start", "num_samples", "num_errors")
_HASHES = re.compile(r"[0-9a-f]{64}( [0-9a-f]{64})*")
_MAX_COUNT = 1 << 62
_MAX_NAME = 180  # bytes: most file systems take 255, and endings and the names of unfinished files come to it
_MAGIC = b"PAR1"
_COMPACT_ABOVE = 1 << 20  # bytes of index.bin below which nothing is won by making it anew
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Home:
    """One `_manifest` folder. `entries` by the name of the shard (`name_in`); `index`: ENTRY [n], index.bin as it fits
    them; `former`: of shards that another version indexed, size and version; `damage`: what could not be believed."""

    path: Path
    entries: dict[str, Entry]
    index: NDArray[Any]
    former: dict[str, tuple[Any, Any]]
    damage: tuple[str, ...] = ()

    @staticmethod
    def load(path: Path) -> Home:
        """Without entries when there is no manifest that this version can read."""
        raw = _content(path / ROOT)
        for _ in range(_TRIES):
            index, before = _map(path / INDEX), raw
            raw = _content(path / ROOT)
            if raw == before:
                break
        entries, former, damage = ({}, {}, ()) if raw is None else _parsed(raw)
        return Home(path, entries, index, former, damage)

    def stale(self, stats: Mapping[str, Stat]) -> dict[str, str]:
        """The shards that must be indexed: what of theirs is damaged, or nothing where they are new or changed."""
        found = {shard: self._fault(name_in(shard), stat) for shard, stat in stats.items()}
        return {shard: fault for shard, fault in found.items() if fault is not None}

    def _fault(self, name: str, stat: Stat) -> str | None:
        entry = self.entries.get(name)
        if entry is None or (entry["size"], entry["version"]) != (stat.size, stat.version):
            return ""
        if entry["start"] + entry["num_samples"] > len(self.index):
            return INDEX
        for ending, facts in entry["files"].items():
            path = file_in(self.path, name, ending)
            if not (_is_parquet(path) if ending == "parquet" else _size(path) == facts["size"]):
                return path.name
        return None

    def commit(self, index: BinaryIO) -> float:
        """Makes records durable, then the root that points to them; returns when."""
        index.flush()
        os.fsync(index.fileno())
        self._write_root()
        return time.monotonic()

    def compact(self) -> None:
        """Makes index.bin anew when more than half of it belongs to no shard. Who mapped the old one keeps it."""
        size = ENTRY.itemsize
        content = (self.path / INDEX).read_bytes() if (_size(self.path / INDEX) or 0) > _COMPACT_ABOVE else b""
        used = sum(entry["num_samples"] for entry in self.entries.values()) * size
        if len(content) <= 2 * used:
            return
        records = bytearray()
        for entry in self.entries.values():
            start = entry["start"] * size
            entry["start"] = len(records) // size
            records += content[start : start + entry["num_samples"] * size]
        (self.path / ROOT).unlink()  # no root may point into the other index
        write_whole(self.path / INDEX, records)
        self._write_root()

    def _write_root(self) -> None:
        content = json.dumps({"version": VERSION, "shards": self.entries}, indent=1, sort_keys=True)
        write_whole(self.path / ROOT, content.encode())


def append(index: BinaryIO, records: bytes) -> int:
    """Adds records; returns the number of the first."""
    start = index.tell() // ENTRY.itemsize
    index.truncate(start * ENTRY.itemsize)  # what a killed process wrote of a record
    index.write(records)
    return start


def name_in(shard: str) -> str:
    """What the shard is called in its folder's manifest: its name; with a hash behind it where that is not the whole
    truth, or no name for a file."""
    whole = name_of(shard)
    query = identity(shard).partition("?")[2] if is_remote(shard) else ""
    clean = whole.replace("/", "_").replace("\0", "_")
    name = clean.encode("utf-8", "surrogateescape")[:_MAX_NAME].decode("utf-8", "ignore")
    rest = query if name == whole else f"{whole}?{query}"
    return f"{name}-{hashlib.sha256(rest.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}" if rest else name


def file_in(folder: Path, name: str, ending: str) -> Path:
    """A shard's file in the manifest, by its ending."""
    return folder / f"{name}.{ending}"


def write_whole(path: Path, content: bytes | bytearray | memoryview) -> None:
    """Whole or not at all: temporary name, flush to disk, rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _map(path: Path) -> NDArray[Any]:
    """ENTRY [n], mapped; what a process that is writing or was killed has of another record does not count."""
    num_entries = (_size(path) or 0) // ENTRY.itemsize
    try:
        return np.asarray(np.memmap(path, ENTRY, mode="r", shape=(num_entries,)))
    except (OSError, ValueError):  # missing, of no records, or replaced by a shorter one
        return np.empty(0, ENTRY)


def _content(path: Path) -> bytes | None:
    """None where there is no such file; nothing of one that cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _parsed(raw: bytes) -> tuple[dict[str, Entry], dict[str, tuple[Any, Any]], tuple[str, ...]]:
    """(entries, former, damage) of a root.json."""
    try:
        content = json.loads(raw)
        version, shards = content["version"], content["shards"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, {}, (ROOT,)
    if version != VERSION:
        rows = [(name, entry) for name, entry in shards if isinstance(entry, dict)]
        return {}, {name: (entry.get("size"), entry.get("version")) for name, entry in rows}, ()
    entries = {name: entry for name, entry in shards if _is_whole(entry)}
    return entries, {}, tuple(f"`{name}` in {ROOT}" for name, _ in shards if name not in entries)


def _is_whole(entry: Any) -> bool:
    """Whether it says all that an entry must, in values that can be meant."""
    try:
        files, ignored, version = entry["files"], entry["ignored"], entry["version"]
        counts = [entry[name] for name in _COUNTS] + [facts["size"] for facts in files.values()] + [*ignored.values()]
        hashes = " ".join([entry["content"], entry["index_sha256"], *(facts["sha256"] for facts in files.values())])
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        isinstance(version, str)
        and set(map(type, counts)) == {int}
        and min(counts) >= 0
        and max(counts) < _MAX_COUNT
        and entry["num_samples"] > 0
        and {"parquet", *(["errors"] if entry["num_errors"] else [])} <= files.keys() <= set(ENDINGS)
        and _HASHES.fullmatch(hashes) is not None
    )


def _is_parquet(part: Path) -> bool:
    """Whether a part is there and not cut off; what it holds is for its readers and `verify` to check."""
    try:
        with open(part, "rb") as file:
            file.seek(-len(_MAGIC), os.SEEK_END)
            return file.read() == _MAGIC
    except OSError:
        return False


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
