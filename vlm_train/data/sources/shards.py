"""Tars of image-text pairs with random access: one `pread` a sample.

The manifest gives the byte range, the headers in that range give the parts, and the uid computed from the parts must be
the uid that the manifest has for the row: bytes that changed after indexing are never trained on under another's name.
Open files are a small least-recently-used set per process. A fork may inherit them: `pread` has no shared position.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_train.data import decode, tar
from vlm_train.data.manifest import open_manifest
from vlm_train.errors import DataError
from vlm_train.types import RawSample

_MAX_OPEN_FILES = 64


class ShardSource:
    """WebDataset tars, as img2dataset writes them.

    Args:
        shards: path, glob, directory, `{00000..00012}` range, or a list of them (`manifest.expand_shards`).

    Raises:
        DataError: a shard is missing, compressed, or holds no usable sample.
    """

    def __init__(self, *, shards: str | Sequence[str]) -> None:
        self.manifest = open_manifest(shards)
        self.fingerprint = self.manifest.fingerprint
        self._files: OrderedDict[int, int] = OrderedDict()

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        """First row of each shard and the end, [num_shards + 1]."""
        return self.manifest.starts

    def __len__(self) -> int:
        return len(self.manifest)

    def __reduce__(self):  # another process opens the manifest itself; the arrays are not sent
        return _reopen, ([str(shard) for shard in self.manifest.shards], self.fingerprint)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def read(self, row: int) -> RawSample:
        """The undecoded sample of a manifest row.

        Raises:
            SampleError: `shard_changed`, the bytes are not those that were indexed.
            OSError: the shard cannot be opened or read.
        """
        number = self.manifest.shard_of(row)
        length = int(self.manifest.lengths[row])
        chunk = os.pread(self._file(number), length, int(self.manifest.offsets[row]))
        shard = self.manifest.shards[number].name
        try:
            key, parts = tar.read_parts(chunk)
        except tar.TarFormatError as error:
            raise _changed(shard, row, error) from None
        uid = self.manifest.uids[row].tobytes()
        if decode.sample_uid(parts) != uid:
            raise _changed(shard, row, f"sample `{key}` has other content than when it was indexed")
        return RawSample(uid=uid, key=key, shard=shard, parts=parts)

    def locate(self, row: int) -> tuple[str, str]:
        """(shard name, key) of a row, for reports; the key is empty where it cannot be read back."""
        number = self.manifest.shard_of(row)
        try:
            chunk = os.pread(self._file(number), int(self.manifest.lengths[row]), int(self.manifest.offsets[row]))
            key = tar.read_parts(chunk)[0]
        except (OSError, tar.TarFormatError):
            key = ""
        return self.manifest.shards[number].name, key

    def _file(self, number: int) -> int:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        if len(self._files) >= _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[number] = os.open(self.manifest.shards[number], os.O_RDONLY | os.O_CLOEXEC)
        return self._files[number]


def _changed(shard: str, row: int, detail: object) -> decode.SampleError:
    return decode.SampleError(
        "shard_changed",
        got=f"row {row} of {shard}: {detail}",
        allowed="the bytes that the manifest was made from",
        remedy="`vlm-train data index` makes the manifest again",
    )


def _reopen(shards: list[str], fingerprint: str) -> ShardSource:
    source = ShardSource(shards=shards)
    if source.fingerprint != fingerprint:
        raise DataError(
            "the shards changed while the run was starting",
            got=f"manifest {source.fingerprint}",
            allowed=f"manifest {fingerprint}",
            remedy="start again once nothing writes to the shards",
        )
    return source
