"""The table of samples: made once from the shards (`indexing`), read by everything else.

`_manifest/` beside the shards, or in the user's cache where that cannot be written, holds

    root.json       an entry per shard: size and version of the file, where its rows stand in index.bin, hashes
    index.bin       ENTRY records of 32 bytes, all that reading a sample takes
    SHARD.parquet   the part of a shard: all that is known of its samples; curation adds columns
    SHARD.records   what a folder's table says, a JSON object a line; only where the shard is a folder
    SHARD.errors    what was left out of it, a JSON object a line; only where there is any

A process maps index.bin into memory, so ranks and workers of a node share one copy and nothing is held per sample, and
opening takes time by the number of shards, not of samples. The fingerprint is a hash over the shards' own hashes over
their uids: it tells content, not how or where it is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.data.formats.base import ENTRY, SCHEMA
from vlm_train.data.home import Entry, Home, file_in
from vlm_train.errors import DataError

_ERROR = {"shard", "key", "reason"}


class Manifest:
    """The samples of an ordered list of shards. Row numbers run through the shards in that order.

    Args:
        shards: locations, in order.
        homes: where each of them is described: (home, its name there).
    """

    def __init__(self, *, shards: Sequence[str], homes: Sequence[tuple[Home, str]]) -> None:
        self.shards = list(shards)
        self.entries_of = [home.entries[name] for home, name in homes]
        self.folders = [home.path for home, _ in homes]
        self._names = [name for _, name in homes]
        counts = [entry["num_samples"] for entry in self.entries_of]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # first row of each shard, and the end
        self.fingerprint = _fingerprint(self.entries_of)
        self.num_errors = sum(entry["num_errors"] for entry in self.entries_of)
        indexes = {home.path: home.index for home, _ in homes}
        self._maps = list(indexes.values())
        numbers = {folder: number for number, folder in enumerate(indexes)}
        self._map_of = np.array([numbers[folder] for folder in self.folders])
        self._base = np.array([entry["start"] for entry in self.entries_of], np.int64) - self.starts[:-1]
        self._sizes = np.array([_num_bytes(entry) for entry in self.entries_of], np.uint64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def parts(self) -> list[Path]:
        """The Parquet part of each shard."""
        return [self.file(shard, "parquet") for shard in range(len(self.shards))]

    def file(self, shard: int, ending: str) -> Path:
        """A shard's file in the manifest, by its ending (`home.ENDINGS`)."""
        return file_in(self.folders[shard], self._names[shard], ending)

    def file_of(self, shard: int) -> str:
        """Location of the bytes that the entries of a shard point into: its own, or those of its records."""
        has_records = "records" in self.entries_of[shard]["files"]
        return str(self.file(shard, "records")) if has_records else self.shards[shard]

    def shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the shard that holds each of `rows` [n]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def entries(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """ENTRY [n] of `rows` [n]."""
        rows = np.asarray(rows, np.int64)
        shards = self.shard_of(rows)
        places, maps = rows + self._base[shards], self._map_of[shards]
        if len(self._maps) == 1:
            return self._maps[0][places]
        found = np.empty(len(rows), ENTRY)
        for number in np.unique(maps):
            found[maps == number] = self._maps[number][places[maps == number]]
        return found

    def within(self, entries: NDArray[Any], shards: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [n]: whether what each of ENTRY [n] points to lies within its shard. Else index.bin is damaged."""
        sizes, offsets = self._sizes[shards], entries["offset"]
        return (offsets <= sizes) & (entries["length"] <= sizes - offsets)

    def uids(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """uint8 [n, 16] of `rows`, or of all."""
        chosen = self.entries(np.arange(len(self)) if rows is None else rows)["uid"]
        return np.ascontiguousarray(chosen).view(np.uint8).reshape(-1, 16)

    def errors(self) -> list[dict[str, str]]:
        """{shard, key, reason} of each sample that indexing left out, in the order of the shards.

        Raises:
            DataError: a list of them is damaged.
        """
        found: list[dict[str, str]] = []
        for shard, entry in enumerate(self.entries_of):
            if entry["num_errors"]:
                found += _errors(self.file(shard, "errors"), entry["num_errors"])
        return found

    def part(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one shard. See `read_part`."""
        return read_part(self.file(shard, "parquet"), self.entries_of[shard]["content"], columns)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of all parts in order; a column that some parts lack is null there.

        Raises:
            DataError: as `read_part`, or a column that other tools added is not of one type.
        """
        tables = [self.part(shard, columns) for shard in range(len(self.shards))]
        try:
            return pa.concat_tables(tables, promote_options="default")
        except pa.ArrowException as error:
            raise DataError("the parts of the manifest have columns that differ in type", got=error) from error


def read_part(part: Path, content: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet part, or those of `columns` that it has.

    Raises:
        DataError: it is missing or damaged, or holds other samples than those of the hash `content`: another process
            has indexed its shard anew.
    """
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if columns is None or name in columns]
            table = file.read(columns=list({*wanted, "uid"}))
        uids = table["uid"].cast(pa.binary(16))  # other tools may have written it as a column of any bytes
        if uids.null_count:
            raise ValueError("a row without a uid")
        found = hashlib.sha256(packed(uids)).hexdigest()
        for name in SCHEMA.names if columns is None else [name for name in columns if name in SCHEMA.names]:
            place = table.column_names.index(name)
            if table[place].type != SCHEMA.field(name).type:
                table = table.set_column(place, SCHEMA.field(name), table[place].cast(SCHEMA.field(name).type))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise damaged(part, error) from error
    if found != content:
        raise damaged(part, "the rows of other samples")
    return table.select(wanted)


def to_parquet(table: pa.Table) -> memoryview:
    """A table as all of ours are written: compressed, with a checksum of each page."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def damaged(file: Path, got: object) -> DataError:
    """The error for a file of the manifest that does not hold what indexing wrote."""
    return DataError(
        f"`{file}` of the manifest cannot be used",
        got=got,
        allowed="what indexing wrote",
        remedy="remove it: it is made again on next use; if the shard has just been indexed anew, start again",
    )


def packed(column: pa.ChunkedArray) -> memoryview:
    """The values of a column of so many bytes each, without null, one after the other."""
    chunk, size = column.combine_chunks(), column.type.byte_width
    return memoryview(chunk.buffers()[1])[size * chunk.offset : size * (chunk.offset + len(chunk))]


def _errors(path: Path, num_errors: int) -> list[dict[str, str]]:
    try:
        found = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    texts = all(isinstance(row, dict) and set(row) == _ERROR and all(map(_is_text, row.values())) for row in found)
    if len(found) != num_errors or not texts:
        raise damaged(path, f"{len(found)} lines, not all of them a sample that was left out")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _num_bytes(entry: Entry) -> int:
    """Of what the entries of a shard point into."""
    return int(entry["files"].get("records", entry)["size"])


def _fingerprint(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry["num_samples"].to_bytes(8, "little") + bytes.fromhex(entry["content"]))
    return digest.hexdigest()
