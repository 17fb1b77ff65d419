"""Makes the manifest, and brings it up to date: a shard is indexed again only when its size or version changed.

Columns that other tools added to a part are kept for the samples that are still there. Every file is written under a
temporary name, flushed and renamed, under a lock, so that ranks and jobs that start together index once and never see
half a file. index.bin only grows: a process that mapped it keeps what it saw, and root.json never points past its end.
A kill costs what was indexed in the last seconds. The parts hold nothing that varies between runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_train.assets import cache_dir
from vlm_train.data.files import StorageOptions
from vlm_train.data.formats import base, choose
from vlm_train.data.manifest import INDEX, ROOT, VERSION, Entry, Home, Manifest
from vlm_train.data.parallel import map_in_processes
from vlm_train.data.patterns import expand_shards
from vlm_train.data.storage import Stat, open_file, stat_files
from vlm_train.errors import DataError
from vlm_train.locations import identity, is_remote, name_of, shown
from vlm_train.log import get_logger

log = get_logger(__name__)

FOLDER = "_manifest"
Progress = Callable[[int, int], None]
"""Called with (megabytes indexed, megabytes in all) after each shard."""

_BYTES_PER_WORKER = 1 << 26  # a process is started for what takes it seconds to index, not for less
_ROOT_EVERY = 2.0  # seconds between two writings of root.json, which is rewritten whole
_MAGIC = b"PAR1"
_COMPACT_ABOVE = 1 << 20  # bytes of index.bin below which nothing is won by making it anew


def open_manifest(
    patterns: str | Sequence[str], progress: Progress | None = None, options: StorageOptions | None = None
) -> Manifest:
    """Indexes the shards that are new or changed, and opens the manifest of all of them. `options`: for servers.

    Raises:
        DataError: a shard is missing, cannot be read at random, or holds no usable sample.
    """
    shards = [str(shard) for shard in expand_shards(patterns, options)]
    by_folder: dict[str, list[str]] = {}
    for shard in shards:
        by_folder.setdefault(_folder(shard), []).append(shard)
    homes: dict[str, tuple[Home, str]] = {}
    for folder, members in by_folder.items():
        home = _up_to_date(folder, members, progress, options)
        homes |= {shard: (home, _name(shard)) for shard in members}
    return Manifest(shards=shards, homes=[homes[shard] for shard in shards])


def index_shard(location: str, options: StorageOptions | None = None) -> base.ShardIndex:
    """Every sample of one shard.

    Raises:
        DataError: the shard cannot be read at random, or holds no usable sample.
    """
    try:
        index = choose.format_of(location).index(open_file(location, options))
    except OSError as error:
        raise DataError(f"shard `{shown(location)}` cannot be read", got=error, remedy="check the path") from error
    if not index.num_samples:
        raise base.no_usable_sample(location, index)
    return index


def _folder(shard: str) -> str:
    """What holds the shard, or the shard itself where it is a folder. Without what only signs a URL."""
    return shard if not is_remote(shard) and os.path.isdir(shard) else identity(shard).rpartition("/")[0]


def _name(shard: str) -> str:
    """What the shard is called in its folder's manifest; fit for the name of a file."""
    name = name_of(shard).replace("/", "_").replace("\0", "_")
    query = identity(shard).partition("?")[2] if is_remote(shard) else ""
    return f"{name}-{hashlib.sha256(query.encode()).hexdigest()[:8]}" if query else name


def _up_to_date(folder: str, shards: list[str], progress: Progress | None, options: StorageOptions | None) -> Home:
    """The manifest of a folder after indexing what is new or changed."""
    stats = _stats(shards, options)
    for path in _candidates(folder):
        home = Home.load(path)
        if home.entries and not _stale(home, stats):
            return home
    path = _writable(folder)
    with _lock(path):
        home = Home.load(path)
        stale = _stale(home, stats)
        if stale:
            _index(home, {shard: stats[shard] for shard in stale}, progress or (lambda done, total: None), options)
        return home


def _stats(shards: list[str], options: StorageOptions | None) -> dict[str, Stat]:
    """Of each shard. Raises DataError for the first that cannot be had."""

    try:
        if is_remote(shards[0]):
            return dict(zip(shards, stat_files([open_file(shard, options) for shard in shards]), strict=True))
        return {shard: choose.stat_of(shard) for shard in shards}
    except OSError as error:
        raise DataError("a shard cannot be read", got=error, remedy="check the path") from error


def _stale(home: Home, stats: dict[str, Stat]) -> list[str]:
    index = home.path / INDEX
    num_entries = index.stat().st_size // base.ENTRY.itemsize if index.is_file() else 0

    def current(shard: str, stat: Stat) -> bool:
        entry = home.entries.get(_name(shard))
        if entry is None or (entry["size"], entry["version"]) != (stat.size, stat.version):
            return False
        return entry["start"] + entry["num_samples"] <= num_entries and _is_parquet(home.path / entry["part"])

    return [shard for shard, stat in stats.items() if not current(shard, stat)]


def _is_parquet(part: Path) -> bool:
    """Whether a part is there and not cut off; what it holds is for `verify` to check."""
    try:
        with open(part, "rb") as file:
            file.seek(-len(_MAGIC), os.SEEK_END)
            return file.read() == _MAGIC
    except OSError:
        return False


def _index(home: Home, stats: dict[str, Stat], progress: Progress, options: StorageOptions | None) -> None:
    """Indexes shards, in processes where there is much to do, and commits their entries to `home` as they come."""
    stale = list(stats)
    total = sum(stat.size for stat in stats.values())
    num_workers = min(len(os.sched_getaffinity(0)), 1 + total // _BYTES_PER_WORKER)
    made = map_in_processes(partial(_write_part, home.path, options), stale, num_workers=num_workers, chunk_size=1)
    with open(home.path / INDEX, "ab") as index:
        try:
            done, written = 0, time.monotonic()
            for shard, (entry, records) in zip(stale, made, strict=True):
                start, stat = _append(index, records), stats[shard]
                home.entries[_name(shard)] = {**entry, "start": start, "size": stat.size, "version": stat.version}
                done += stat.size
                progress(done >> 20, total >> 20)
                written = _commit(home, index) if time.monotonic() - written > _ROOT_EVERY else written
        finally:
            _commit(home, index)
    _compact(home)


def _append(index: BinaryIO, records: bytes) -> int:
    """Adds records; returns the number of the first."""
    start = index.tell() // base.ENTRY.itemsize
    index.truncate(start * base.ENTRY.itemsize)  # what a killed process wrote of a record
    index.write(records)
    return start


def _commit(home: Home, index: BinaryIO) -> float:
    """Makes the records durable, then the root that points to them; returns when."""
    index.flush()
    os.fsync(index.fileno())
    _write_root(home)
    return time.monotonic()


def _write_root(home: Home) -> None:
    content = json.dumps({"version": VERSION, "shards": home.entries}, indent=1, sort_keys=True)
    _write(home.path / ROOT, content.encode())


def _compact(home: Home) -> None:
    """Makes index.bin anew when more than half of it belongs to no shard. Who mapped the old one keeps it."""
    size = base.ENTRY.itemsize
    content = (home.path / INDEX).read_bytes() if (home.path / INDEX).stat().st_size > _COMPACT_ABOVE else b""
    used = sum(entry["num_samples"] for entry in home.entries.values()) * size
    if len(content) <= 2 * used:
        return
    records = b""
    for entry in home.entries.values():
        start = entry["start"] * size
        entry["start"] = len(records) // size
        records += content[start : start + entry["num_samples"] * size]
    (home.path / ROOT).unlink()  # no root may point into the other index
    _write(home.path / INDEX, records)
    _write(
        home.path / ROOT, json.dumps({"version": VERSION, "shards": home.entries}, indent=1, sort_keys=True).encode()
    )


def _cache(folder: str) -> Path:
    name = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return cache_dir() / "manifests" / name


def _candidates(folder: str) -> list[Path]:
    """Where a manifest of the folder may lie: beside the shards, or in the user's cache."""
    return [_cache(folder)] if is_remote(folder) else [Path(folder) / FOLDER, _cache(folder)]


def _writable(folder: str) -> Path:
    """The first place that can be written."""
    for path in _candidates(folder):
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            (path / ".lock").touch()
            if os.access(path, os.W_OK):
                return path
    raise DataError(
        f"the manifest of `{folder}` cannot be written",
        got=f"none of {', '.join(map(str, _candidates(folder)))} is writable",
        remedy="set VLM_TRAIN_CACHE to a folder that you may write",
    )


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    with open(home / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is indexing `%s`", home.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file lets go of the lock


def _write_part(home: Path, options: StorageOptions | None, shard: str) -> tuple[Entry, bytes]:
    """Indexes a shard and writes its part; returns its entry, without what the caller knows, and its records."""
    index = index_shard(shard, options)
    part = home / f"{_name(shard)}.parquet"
    table = _keep_columns(index.table(), part)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    _write(part, content)
    if index.errors:
        _write(part.with_suffix(".errors"), "".join(json.dumps(error) + "\n" for error in index.errors).encode())
        log.warning("%s: %d samples left out, first %s", shown(shard), len(index.errors), index.errors[0])
    if index.records is not None:
        _write(part.with_suffix(".records"), index.records)
    entries = index.entries()
    entry = {
        "part": part.name,
        "records": None if index.records is None else part.with_suffix(".records").name,
        "part_sha256": hashlib.sha256(content).hexdigest(),
        "num_samples": index.num_samples,
        "content": hashlib.sha256(entries["uid"].tobytes()).hexdigest(),
        "num_errors": len(index.errors),
        "ignored": dict(index.ignored),
    }
    return entry, entries.tobytes()


def _keep_columns(table: pa.Table, part: Path) -> pa.Table:
    """Carries columns that are not ours over from an older part, if any, to the rows whose content is the same."""
    try:
        old = pq.read_table(part)
    except (OSError, pa.ArrowInvalid):
        return table
    foreign = [name for name in old.column_names if name not in base.SCHEMA.names]
    if foreign:
        row_of = {uid: row for row, uid in enumerate(old["uid"].to_pylist())}
        rows = pa.array([row_of.get(uid) for uid in table["uid"].to_pylist()], pa.int64())
        for name in foreign:
            table = table.append_column(name, old[name].take(rows))
    return table


def _write(path: Path, content: Any) -> None:
    """Whole or not at all: temporary name, flush to disk, rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
