"""Reads the captions of shards, and nothing else of them, to train a tokenizer on.

They are taken by the same rules as in training (`tar.index_tar`, `decode.decode_captions`), so a tokenizer is trained
on exactly the texts that it will meet. Only the text parts are read from disk.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_train.data.decode import SampleError, decode_captions, decode_metadata
from vlm_train.data.tar import TarSample, index_tar
from vlm_train.errors import DataError


class CaptionStream:
    """Iterates the captions of shards in file order; counts what it read and what it had to leave out.

    `num_captions`: captions given so far. `skipped`: number of samples left out, by reason. Both start anew with each
    iteration.
    """

    def __init__(self, shards: Sequence[Path], *, limit: int | None = None) -> None:
        self.shards, self.limit = list(shards), limit
        self.num_captions = 0
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        self.num_captions = 0
        self.skipped = Counter()
        for caption in self._captions():
            if self.num_captions == self.limit:
                return
            self.num_captions += 1
            yield caption

    def _captions(self) -> Iterator[str]:
        for shard in self.shards:
            try:
                index = index_tar(shard)
            except OSError as error:
                raise DataError(f"shard `{shard}` cannot be opened", got=error, remedy="check the path") from error
            self.skipped.update(error["reason"] for error in index.errors)
            with open(shard, "rb", buffering=0) as file:
                for sample in index.samples:
                    yield from self._captions_of(sample, file.fileno())

    def _captions_of(self, sample: TarSample, descriptor: int) -> list[str]:
        texts = {part.name: part for part in sample.parts if part.name in ("txt", "json")}
        parts = {name: os.pread(descriptor, part.size, part.offset) for name, part in texts.items()}
        try:
            return decode_captions(parts, decode_metadata(parts))
        except SampleError as error:
            self.skipped[error.reason] += 1
            return []


def iter_captions(shards: Sequence[Path], limit: int | None = None) -> CaptionStream:
    """Every caption of the shards, at most `limit` of them.

    Raises (while iterating):
        DataError: a shard cannot be opened, is compressed, or holds no usable sample.
    """
    return CaptionStream(shards, limit=limit)
