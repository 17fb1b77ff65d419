"""The table of samples: made once from the headers and bytes of the shards, read by everything else.

One Parquet part per shard and one `root.json` that names every part with its sha256 and the size and time of its shard.
They lie beside the shards in `_manifest/`, or in the user's cache where the data is read-only. A shard is indexed again
only when its size or time changed; columns that other tools added to a part are kept for the samples that are still
there. Every file is written under a temporary name, flushed and renamed, under a lock, so that ranks and jobs that
start together index once and never see half a file. The parts hold nothing that varies between runs: the same shard
gives the same bytes.

In memory a sample costs 28 bytes (uid 16, offset 8, length 4), in NumPy arrays that forked workers share; keys are read
back from the tar when one is wanted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.data import decode, tar
from vlm_train.data.parallel import map_in_processes
from vlm_train.data.patterns import expand_shards
from vlm_train.errors import DataError
from vlm_train.log import get_logger

log = get_logger(__name__)

VERSION = 1
FOLDER = "_manifest"
Progress = Callable[[str], None]
"""Called with one line for each shard that was indexed."""

_BYTES_PER_WORKER = 1 << 28  # a process is started for what takes it seconds to index, not for less
_MAX_LENGTH = (1 << 31) - (1 << 12)  # the most that one `pread` returns on Linux
_PART = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEMA = pa.schema(
    [
        ("uid", pa.binary(16)),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("parts", pa.list_(_PART)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_hash", pa.uint64()),
        ("label", pa.int64()),
    ]
)


@dataclass(slots=True)
class Manifest:
    """The samples of an ordered list of shards. Row numbers run through the shards in that order.

    `shards`: paths. `parts`: the Parquet part of each. `starts` int64 [num_shards + 1]: first row of each shard, and
    the end. `uids` uint8 [N, 16]. `offsets` int64 [N], `lengths` uint32 [N]: bytes of the sample in its shard.
    `fingerprint`: sha256 over what the samples are, in order, not over how a part file stores it: new columns or
    another Parquet writer change nothing. `errors`: {shard, key, reason} of what indexing left out.
    """

    shards: list[Path]
    parts: list[Path]
    starts: NDArray[np.int64]
    uids: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.uint32]
    fingerprint: str
    errors: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets)

    def shard_of(self, row: int) -> int:
        """Number of the shard that holds `row`."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of all parts in order; a column that some parts lack is null there."""

        def read(part: Path) -> pa.Table:
            names = pq.read_schema(part).names
            return pq.read_table(part, columns=[name for name in columns or names if name in names])

        return pa.concat_tables(map(read, self.parts), promote_options="default")


def open_manifest(patterns: str | Sequence[str], progress: Progress | None = None) -> Manifest:
    """Indexes the shards that are new or changed, and loads the manifest of all of them.

    Raises:
        DataError: a shard is missing, compressed, or holds no usable sample.
    """
    shards = expand_shards(patterns)
    by_folder: dict[Path, list[Path]] = {}
    for shard in shards:
        by_folder.setdefault(shard.parent, []).append(shard)
    entries: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for folder, members in by_folder.items():
        home, root = _up_to_date(folder, members, progress)
        entries |= {shard: (home / root[shard.name]["part"], root[shard.name]) for shard in members}
    return _load(shards, [entries[shard] for shard in shards])


def index_shard(path: Path) -> tuple[pa.Table, list[dict[str, str]]]:
    """The manifest rows of one shard, and {shard, key, reason} of each sample that is left out.

    Raises:
        DataError: the shard is compressed or holds no usable sample.
    """
    index = tar.index_tar(path)
    rows: list[dict[str, Any]] = []
    with open(path, "rb", buffering=0) as file:
        for sample in index.samples:
            try:
                rows.append(_describe(sample, path.name, file.fileno()))
            except (decode.SampleError, tar.TarFormatError) as error:
                index.errors.append({"shard": path.name, "key": sample.key, "reason": error.reason})
    if not rows:
        raise tar.no_usable_sample(path, index.errors, index.num_ignored)
    return pa.Table.from_pylist(rows, schema=SCHEMA), index.errors


def _describe(sample: tar.TarSample, shard: str, descriptor: int) -> dict[str, Any]:
    if sample.length > _MAX_LENGTH:
        raise decode.SampleError("sample_too_large", got=f"{sample.length} bytes")
    _, contents = tar.read_parts(os.pread(descriptor, sample.length, sample.offset))
    image = decode.open_image(decode.first_image(contents))
    metadata = decode.decode_metadata(contents)
    captions = decode.decode_captions(contents, metadata)
    label = metadata.get("label")
    return {
        "uid": decode.sample_uid(contents),
        "shard": shard,
        "key": sample.key,
        "offset": sample.offset,
        "length": sample.length,
        "parts": [{"name": part.name, "offset": part.offset, "size": part.size} for part in sample.parts],
        "width": image.width,
        "height": image.height,
        "caption_hash": decode.caption_hash(captions[0]),
        "label": label if isinstance(label, int) and not isinstance(label, bool) else None,
    }


def _up_to_date(folder: Path, shards: list[Path], progress: Progress | None) -> tuple[Path, dict[str, Any]]:
    """(folder of the manifest, entry by shard name) after indexing what is new or changed."""
    home = folder / FOLDER
    root = _read_root(home)
    if not _stale(home, root, shards):
        return home, root
    home = _writable(folder)
    with _lock(home):
        root = _read_root(home)
        stale = _stale(home, root, shards)
        total = sum(shard.stat().st_size for shard in stale)
        num_workers = min(len(os.sched_getaffinity(0)), 1 + total // _BYTES_PER_WORKER)
        entries = map_in_processes(partial(_write_part, home), stale, num_workers=num_workers, chunk_size=1)
        for number, (shard, entry) in enumerate(zip(stale, entries, strict=True), 1):
            root[shard.name] = entry
            content = json.dumps({"version": VERSION, "shards": root}, indent=1, sort_keys=True)
            _write(home / "root.json", content.encode())
            if entry["errors"]:
                log.warning("%s: %d samples left out, first %s", shard, len(entry["errors"]), entry["errors"][0])
            if progress is not None:
                progress(f"indexed {shard.name}, {number} of {len(stale)} in {folder}")
    return home, root


def _read_root(home: Path) -> dict[str, Any]:
    """Entry by shard name; empty when there is no manifest that this version can read."""
    try:
        content = json.loads((home / "root.json").read_bytes())
        return dict(content["shards"]) if content["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _stale(home: Path, root: dict[str, Any], shards: list[Path]) -> list[Path]:
    def current(shard: Path) -> bool:
        entry, stat = root.get(shard.name), shard.stat()
        if entry is None or (entry["size"], entry["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            return False
        part = home / entry["part"]
        return part.is_file() and _sha256(part.read_bytes()) == entry["sha256"]

    return [shard for shard in shards if not current(shard)]


def _writable(folder: Path) -> Path:
    """Beside the shards, or in the user's cache when that cannot be written."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for home in (folder / FOLDER, cache / "vlm-train" / "manifests" / name):
        with contextlib.suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            (home / ".lock").touch()
            if os.access(home, os.W_OK):
                return home
    raise DataError(
        f"the manifest of `{folder}` cannot be written",
        got=f"neither `{folder / FOLDER}` nor `{cache}` is writable",
        remedy="set XDG_CACHE_HOME to a folder that you may write",
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


def _write_part(home: Path, shard: Path) -> dict[str, Any]:
    """Indexes a shard and writes its part; returns its entry in root.json."""
    stat = shard.stat()  # before reading: a shard that changes meanwhile is stale at the next look
    table, errors = index_shard(shard)
    part = home / f"{shard.name.removesuffix('.tar')}.parquet"
    table = _keep_columns(table, part)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    _write(part, content)
    return {
        "part": part.name,
        "sha256": _sha256(content),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "num_samples": len(table),
        "errors": errors,
    }


def _keep_columns(table: pa.Table, part: Path) -> pa.Table:
    """Carries columns that are not ours over from an older part, if any, to the rows whose content is the same."""
    try:
        old = pq.read_table(part)
    except (OSError, pa.ArrowInvalid):
        return table
    row_of = {uid: row for row, uid in enumerate(old["uid"].to_pylist())}
    rows = pa.array([row_of.get(uid) for uid in table["uid"].to_pylist()], pa.int64())
    for name in old.column_names:
        if name not in SCHEMA.names:
            table = table.append_column(name, old[name].take(rows))
    return table


def _load(shards: list[Path], entries: list[tuple[Path, dict[str, Any]]]) -> Manifest:
    starts = np.concatenate([[0], np.cumsum([entry["num_samples"] for _, entry in entries], dtype=np.int64)])
    num_rows = int(starts[-1])
    uids = np.empty((num_rows, 16), np.uint8)
    offsets, lengths = np.empty(num_rows, np.int64), np.empty(num_rows, np.uint32)
    for start, stop, (part, _) in zip(starts[:-1], starts[1:], entries, strict=True):
        table = pq.read_table(part, columns=["uid", "offset", "length"], use_threads=False)
        flat = np.frombuffer(b"".join(table["uid"].to_pylist()), np.uint8)
        uids[start:stop] = flat.reshape(-1, 16)
        offsets[start:stop] = table["offset"].to_numpy()
        lengths[start:stop] = table["length"].to_numpy()
    return Manifest(
        shards=shards,
        parts=[part for part, _ in entries],
        starts=starts,
        uids=uids,
        offsets=offsets,
        lengths=lengths,
        fingerprint=_sha256(starts.tobytes() + uids.tobytes()),
        errors=[error for _, entry in entries for error in entry["errors"]],
    )


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: temporary name, flush to disk, rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
