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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_train.assets import cache_dir
from vlm_train.data.files import StorageOptions
from vlm_train.data.formats import base, choose
from vlm_train.data.home import ENDINGS, INDEX, Entry, Home, append, file_in, name_in, write_whole
from vlm_train.data.manifest import Manifest, to_parquet
from vlm_train.data.parallel import map_in_processes
from vlm_train.data.patterns import expand_shards
from vlm_train.data.storage import Stat, open_file, stat_files
from vlm_train.errors import DataError
from vlm_train.locations import identity, is_remote, shown
from vlm_train.log import get_logger

log = get_logger(__name__)

FOLDER = "_manifest"
Progress = Callable[[int, int], None]
"""Called with (megabytes indexed, megabytes in all) after each shard."""

_BYTES_PER_WORKER = 1 << 26  # a process is started for what takes it seconds to index, not for less
_ROOT_EVERY = 2.0  # seconds between two writings of root.json, which is rewritten whole


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
        homes |= {shard: (home, name_in(shard)) for shard in members}
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


def _up_to_date(folder: str, shards: list[str], progress: Progress | None, options: StorageOptions | None) -> Home:
    """The manifest of a folder after indexing what is new, changed or damaged."""
    stats = _stats(shards, options)
    for path in _candidates(folder):
        home = Home.load(path)
        if not home.stale(stats):
            return home
    path = _writable(folder)
    try:
        with locked(path, "waiting for another process that is indexing `%s`"):
            home = _made_current(path, stats, progress or (lambda done, total: None), options)
    except OSError as error:
        raise DataError(
            f"the manifest of `{shown(folder)}` cannot be written",
            got=error,
            allowed=f"room and the right to write in `{path}`",
            remedy="make room there, or remove what is in the way",
        ) from error
    if home.stale(stats):
        raise DataError(f"the manifest in `{path}` cannot be read back", remedy="remove it: it is made again")
    return home


def _made_current(path: Path, stats: dict[str, Stat], progress: Progress, options: StorageOptions | None) -> Home:
    home = Home.load(path)
    stale = home.stale(stats)
    if not stale:
        return home
    if damage := [*home.damage, *filter(None, stale.values())]:
        found = f"{damage[0]} and {len(damage) - 1} more" if damage[1:] else damage[0]
        log.warning("the manifest in `%s` is damaged (%s): that is made again", path, found)
    _index(home, {shard: stats[shard] for shard in stale}, progress, options)
    return Home.load(path)


def _stats(shards: list[str], options: StorageOptions | None) -> dict[str, Stat]:
    """Of each shard. Raises DataError for the first that cannot be had."""

    try:
        if is_remote(shards[0]):
            return dict(zip(shards, stat_files([open_file(shard, options) for shard in shards]), strict=True))
        return {shard: choose.stat_of(shard) for shard in shards}
    except OSError as error:
        raise DataError("a shard cannot be read", got=error, remedy="check the path") from error


def _index(home: Home, stats: dict[str, Stat], progress: Progress, options: StorageOptions | None) -> None:
    """Indexes shards, in processes where there is much to do, and commits their entries to `home` as they come."""
    total = sum(stat.size for stat in stats.values())
    num_workers = min(len(os.sched_getaffinity(0)), 1 + total // _BYTES_PER_WORKER)
    for scratch in home.path.glob(".*.tmp"):  # of a process that was killed
        scratch.unlink()
    stale = [(shard, home.former.get(name_in(shard)) == (stat.size, stat.version)) for shard, stat in stats.items()]
    made = map_in_processes(partial(_write_part, home.path, options), stale, num_workers=num_workers, chunk_size=1)
    with open(home.path / INDEX, "ab") as index:
        try:
            done, written = 0, time.monotonic()
            for (shard, stat), (entry, records) in zip(stats.items(), made, strict=True):
                start = append(index, records)
                home.entries[name_in(shard)] = {**entry, "start": start, "size": stat.size, "version": stat.version}
                done += stat.size
                progress(done >> 20, total >> 20)
                written = home.commit(index) if time.monotonic() - written > _ROOT_EVERY else written
        finally:
            home.commit(index)
    home.compact()


def _cache(folder: str) -> Path:
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
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
        f"the manifest of `{shown(folder)}` cannot be written",
        got=f"none of {', '.join(map(str, _candidates(folder)))} is writable",
        remedy="set VLM_TRAIN_CACHE to a folder that you may write",
    )


@contextlib.contextmanager
def locked(home: Path, waiting: str | None = None) -> Iterator[None]:
    """Holds a manifest's folder for this process, so that none undoes what another wrote. `waiting`: what is told where
    another holds it, of its shards' folder."""
    with open(home / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                log.info(waiting, home.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file lets go of the lock


def _write_part(home: Path, options: StorageOptions | None, item: tuple[str, bool]) -> tuple[Entry, bytes]:
    """Indexes a shard and writes its files; returns its entry, without what the caller knows, and its records. `item`:
    the shard, and whether its part is that of the same bytes by another version, which may have had other uids."""
    shard, is_former = item
    index = index_shard(shard, options)
    part = file_in(home, name_in(shard), "parquet")
    table = _keep_columns(index.table(), part, ["key", "width", "height", "caption_hash"] if is_former else ["uid"])
    files = {"parquet": bytes(to_parquet(table))}
    if index.errors:
        files["errors"] = "".join(json.dumps(error) + "\n" for error in index.errors).encode()
        log.warning("%s: %d samples left out, first %s", shown(shard), len(index.errors), index.errors[0])
    if index.records is not None:
        files["records"] = index.records
    for ending in ENDINGS:
        if ending in files:
            write_whole(file_in(home, name_in(shard), ending), files[ending])
        else:
            file_in(home, name_in(shard), ending).unlink(missing_ok=True)
    entries = index.entries()
    entry = {
        "num_samples": index.num_samples,
        "content": hashlib.sha256(entries["uid"].tobytes()).hexdigest(),
        "index_sha256": hashlib.sha256(entries.tobytes()).hexdigest(),
        "num_errors": len(index.errors),
        "ignored": dict(index.ignored),
        "files": {
            ending: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for ending, content in files.items()
        },
    }
    return entry, entries.tobytes()


def _keep_columns(table: pa.Table, part: Path, same: Sequence[str]) -> pa.Table:
    """Carries columns that are not ours over from an older part, if any, to the rows that agree with theirs in the
    columns `same`."""
    try:
        old = pq.read_table(part)
        foreign = [name for name in old.column_names if name not in base.SCHEMA.names]
        row_of = {key: row for row, key in reversed(list(enumerate(_keys(old, same))))} if foreign else {}
        rows = pa.array([row_of.get(key) for key in _keys(table, same)], pa.int64())
        columns = {name: old[name].take(rows) for name in foreign}
    except FileNotFoundError:
        return table
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        log.warning("`%s` cannot be read (%s): columns that other tools added to it are lost", part, error)
        return table
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _keys(table: pa.Table, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))
