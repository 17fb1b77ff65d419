"""Shards as the functions read them that an engine maps: those that were meant, whole, or an error."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm_train.data.decode import SampleError
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError
from vlm_train.types import RawSample

_CHUNK = 256  # samples whose bytes are held at a time


def open_shard(shard: str, content: str) -> ShardSource:
    """A shard with samples of hash `content`. Raises DataError where it has been indexed anew meanwhile."""
    source = ShardSource(shards=shard)
    if source.manifest.entries_of[0]["content"] != content:
        raise DataError("a shard was indexed anew meanwhile", got=shard, remedy="start again")
    return source


def samples_of(shard: str, content: str) -> Iterator[RawSample | SampleError]:
    """The samples of `open_shard`, in order; an error for one that cannot be read.

    Raises:
        DataError: as `open_shard`, or the shard cannot be read at all. It may be there again tomorrow: nothing is to be
            kept of today.
    """
    source = open_shard(shard, content)
    for start in range(0, len(source), _CHUNK):
        for sample in source.read(np.arange(start, min(start + _CHUNK, len(source)))):
            if isinstance(sample, SampleError) and sample.reason == "shard_unreadable":
                raise DataError("a shard cannot be read", got=sample.detail, remedy="restore it, and start again")
            yield sample
