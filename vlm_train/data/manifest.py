"""The table of samples: made once from the shards (`indexing`), read by everything else.

`_manifest/` beside the shards, or in the user's cache where that cannot be written, holds

    root.json       an entry per shard: size and version of the file, its part, where its rows stand in index.bin
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.data.formats.base import ENTRY
from vlm_train.errors import DataError

VERSION = 2
ROOT = "root.json"
INDEX = "index.bin"

Entry = dict[str, Any]
"""Of a shard in root.json: size, version, part, part_sha256, records, start, num_samples, content (sha256 over
its uids), num_errors, ignored."""


@dataclass(frozen=True, slots=True)
class Home:
    """One `_manifest` folder and what its root.json says of each shard, by name."""

    path: Path
    entries: dict[str, Entry]

    @staticmethod
    def load(path: Path) -> Home:
        """Without entries when there is no manifest that this version can read."""
        try:
            content = json.loads((path / ROOT).read_bytes())
            return Home(path, dict(content["shards"]) if content["version"] == VERSION else {})
        except (OSError, ValueError, KeyError, TypeError):
            return Home(path, {})


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
        counts = [entry["num_samples"] for entry in self.entries_of]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # first row of each shard, and the end
        self.fingerprint = _fingerprint(self.entries_of)
        self.num_errors = sum(entry["num_errors"] for entry in self.entries_of)
        self._maps = [_map(folder) for folder in dict.fromkeys(self.folders)]
        numbers = {folder: number for number, folder in enumerate(dict.fromkeys(self.folders))}
        self._map_of = np.array([numbers[folder] for folder in self.folders])
        self._base = np.array([entry["start"] for entry in self.entries_of], np.int64) - self.starts[:-1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def parts(self) -> list[Path]:
        """The Parquet part of each shard."""
        return [folder / entry["part"] for folder, entry in zip(self.folders, self.entries_of, strict=True)]

    def file_of(self, shard: int) -> str:
        """Location of the bytes that the entries of a shard point into: its own, or those of its records."""
        records = self.entries_of[shard]["records"]
        return str(self.folders[shard] / records) if records else self.shards[shard]

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

    def uids(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """uint8 [n, 16] of `rows`, or of all."""
        chosen = self.entries(np.arange(len(self)) if rows is None else rows)["uid"]
        return np.ascontiguousarray(chosen).view(np.uint8).reshape(-1, 16)

    def errors(self) -> list[dict[str, str]]:
        """{shard, key, reason} of each sample that indexing left out, in the order of the shards."""
        found: list[dict[str, str]] = []
        for part, entry in zip(self.parts, self.entries_of, strict=True):
            if entry["num_errors"]:
                lines = part.with_suffix(".errors").read_text("utf-8").splitlines()
                found += [json.loads(line) for line in lines]
        return found

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of all parts in order; a column that some parts lack is null there."""

        def read(part: Path) -> pa.Table:
            names = pq.read_schema(part).names
            return pq.read_table(part, columns=[name for name in columns or names if name in names])

        return pa.concat_tables(map(read, self.parts), promote_options="default")


def _fingerprint(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry["num_samples"].to_bytes(8, "little") + bytes.fromhex(entry["content"]))
    return digest.hexdigest()


def _map(folder: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.memmap(folder / INDEX, ENTRY, mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the index of the manifest in `{folder}` cannot be read",
            got=error,
            remedy=f"remove `{folder}`: it is made again on next use",
        ) from error
