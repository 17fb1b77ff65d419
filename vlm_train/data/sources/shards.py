"""The samples of an ordered list of shards, of any format, on a disk or a server: what the loaders read from.

The manifest says where a row lies, the format of its shard what its bytes mean, `storage` how to get them. A rank batch
is read in one call, shard by shard, so that a server is asked for many ranges at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.decode import SampleError
from vlm_train.data.files import File, Stat, StorageOptions
from vlm_train.data.formats.base import Parts, changed
from vlm_train.data.formats.choose import format_of
from vlm_train.data.indexing import open_manifest
from vlm_train.data.local import printable
from vlm_train.data.manifest import read_part
from vlm_train.data.selection import Selection
from vlm_train.data.storage import open_file
from vlm_train.errors import DataError
from vlm_train.locations import is_remote, name_of
from vlm_train.types import RawSample


class ShardSource:
    """Shards of any format.

    Args:
        shards: path, glob, directory, `{00000..00012}` range, URL, or a list of them (`patterns.expand_shards`).
        options: how servers are treated, where shards lie on any.

    Raises:
        DataError: a shard is missing, cannot be read at random, or holds no usable sample.
    """

    def __init__(self, *, shards: str | Sequence[str], options: StorageOptions | None = None) -> None:
        self.options = options or StorageOptions()
        self.manifest = open_manifest(shards, options=self.options)
        self.fingerprint = self.manifest.fingerprint
        self._selection: Selection | None = None
        self._window_bytes = 0
        self._files: dict[int, File] = {}

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        """First row of each shard and the end, [num_shards + 1]."""
        return self.manifest.starts

    def __len__(self) -> int:
        return len(self.manifest)

    def __reduce__(self):  # another process opens the manifest itself; nothing that is mapped is sent
        return _reopen, (self.manifest.shards, self.options, self.fingerprint)

    def expect(self, selection: Selection, shuffle_window: int) -> None:
        """Told before reading which rows will be read, and how many shards in turn: what of a server's shards is worth
        keeping on the local disk follows from it."""
        sizes = sorted((entry["size"] for entry in self.manifest.entries_of), reverse=True)
        share = selection.content.num_kept() / len(self)
        self._selection = selection
        self._window_bytes = int(sum(sizes[: shuffle_window or 1]) * (share if share < 0.5 else 1.0))

    def read(self, rows: NDArray[np.int64]) -> list[RawSample | SampleError]:
        """The undecoded samples of manifest rows [n], in that order; one that cannot be had is a SampleError
        (`shard_changed`, `unreadable`, `shard_unreadable`) in its place."""
        rows = np.asarray(rows, np.int64)
        entries, shards = self.manifest.entries(rows), self.manifest.shard_of(rows)
        within = self.manifest.within(entries, shards)
        found: list[Any] = [None] * len(rows)
        for place in np.flatnonzero(~within).tolist():
            found[place] = changed(self.name_of(int(shards[place])), "index.bin points beyond it")
        for shard in np.unique(shards[within]).tolist():
            places = np.flatnonzero((shards == shard) & within)
            results = self._read_shard(shard, entries[places])
            for place, result in zip(places.tolist(), results, strict=True):
                found[place] = result
        return found

    def _read_shard(self, shard: int, entries: NDArray[Any]) -> list[RawSample | SampleError]:
        name = self.name_of(shard)
        found = []
        for result, uid in zip(self._parts(shard, entries), entries["uid"].tolist(), strict=True):
            sample = result if isinstance(result, SampleError) else RawSample(uid, result[0], name, result[1])
            found.append(sample)
        return found

    def _parts(self, shard: int, entries: NDArray[Any]) -> list[Parts | SampleError]:
        """As the format reads them. Where that fails each is tried for itself: which samples a rank asks for together
        must not decide which of them are lost."""
        file = self._file(shard)
        try:
            return format_of(self.manifest.shards[shard]).read(file, entries)
        except OSError as error:
            if len(entries) == 1 or not _is_there(file):
                reason = "unreadable" if _is_there(file) else "shard_unreadable"
                return [SampleError(reason, got=error)] * len(entries)
            return [self._parts(shard, entries[place : place + 1])[0] for place in range(len(entries))]

    def _file(self, shard: int) -> File:
        location = self.manifest.file_of(shard)
        if not is_remote(location):
            return open_file(location)
        if shard not in self._files:
            entry = self.manifest.entries_of[shard]
            self._files[shard] = open_file(
                location,
                self.options,
                stat=Stat(size=entry["size"], version=entry["version"]),
                kept=partial(self._kept_ranges, shard) if self._selection is not None else None,
                window_bytes=self._window_bytes,
            )
        return self._files[shard]

    def _kept_ranges(self, shard: int) -> list[tuple[int, int]]:
        assert self._selection is not None
        rows = self._selection.kept(int(self.manifest.starts[shard]), int(self.manifest.starts[shard + 1]))
        entries = self.manifest.entries(rows)
        entries = entries[self.manifest.within(entries, np.full(len(entries), shard))]
        return list(zip(entries["offset"].tolist(), entries["length"].tolist(), strict=True))

    def name_of(self, shard: int) -> str:
        """The file name of a shard."""
        return printable(name_of(self.manifest.shards[shard]))

    def locate(self, row: int) -> tuple[str, str]:
        """(shard name, key) of a row, for reports; from the manifest, so it needs no shard. The key is empty where that
        no longer knows it: another process has indexed the shard anew meanwhile, or the part is damaged."""
        shard = int(self.manifest.shard_of(np.array([row]))[0])
        keys = _keys(self.manifest.parts[shard], self.manifest.entries_of[shard]["content"])
        key = "" if keys is None else keys[row - int(self.manifest.starts[shard])].as_py()
        return self.name_of(shard), key


def _is_there(file: File) -> bool:
    try:
        file.stat()
    except OSError:
        return False
    return True


@lru_cache(maxsize=4)
def _keys(part: Path, content: str) -> Any:
    """The keys of a part, None where it cannot be used."""
    try:
        return read_part(part, content, ["key"])["key"]
    except DataError:
        return None


def _reopen(shards: list[str], options: StorageOptions, fingerprint: str) -> ShardSource:
    source = ShardSource(shards=shards, options=options)
    if source.fingerprint != fingerprint:
        raise DataError(
            "the shards changed while the run was starting",
            got=f"manifest {source.fingerprint}",
            allowed=f"manifest {fingerprint}",
            remedy="start again once nothing writes to the shards",
        )
    return source
