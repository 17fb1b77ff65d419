"""The training split as evaluation reads it: every source once, whatever a selection or a mixture makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_train.data.building import TrainSplit
from vlm_train.errors import ConfigError


def split(shards: object, streaming: bool = False) -> TrainSplit:
    data = {"train": {"shards": shards}, "streaming": streaming, "cache_gb": 1.0, "retry_seconds": 1.0}
    return TrainSplit(data, lambda source: [source.locate(row)[1] for row in range(len(source))])


def test_every_sample_of_every_source_once(scenes: Path) -> None:
    train, val = str(scenes / "train"), str(scenes / "val")
    one = list(split(train).batches())
    both = list(split({"a": {"shards": train, "weight": 9.0}, "b": {"shards": val, "selection": "x"}}).batches())
    assert len(set(both)) == 240 and both[: len(one)] == one and 0 < len(one) < 240


def test_captions_of_a_stream_and_of_shards(scenes: Path) -> None:
    train = str(scenes / "train")
    assert sorted(split(train).captions()) == sorted(split(train, streaming=True).captions())
    with pytest.raises(ConfigError, match="cannot read a stream"):
        next(split(train, streaming=True).batches())
