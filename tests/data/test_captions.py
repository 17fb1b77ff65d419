"""Caption reading: every caption in order, bad ones counted, pictures not touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_train.data.captions import iter_captions
from vlm_train.data.writer import ShardWriter
from vlm_train.errors import DataError

IMAGE = b"\xff\xd8\xff pretend"


def shards(directory: Path, samples: list[dict[str, bytes]], max_samples: int = 3) -> list[Path]:
    writer = ShardWriter(directory, max_samples=max_samples)
    for index, parts in enumerate(samples):
        writer.write(f"{index:04d}", {"jpg": IMAGE, **parts})
    return [directory / row["file"] for row in writer.close()]


def test_captions_of_text_and_json_in_order(tmp_path):
    samples = [
        {"txt": b"one"},
        {"txt": b"two", "json": json.dumps({"captions": ["two", "zwei"]}).encode()},
        {"json": json.dumps({"caption": "three"}).encode()},
        {"txt": "vier \U0001f642".encode()},
    ]
    stream = iter_captions(shards(tmp_path, samples, max_samples=2))
    assert list(stream) == ["one", "two", "zwei", "three", "vier \U0001f642"]
    assert stream.num_captions == 5
    assert not stream.skipped
    assert list(stream) == ["one", "two", "zwei", "three", "vier \U0001f642"]  # it can be read again


def test_bad_samples_are_skipped_and_counted(tmp_path):
    samples = [
        {"txt": b"good"},
        {"txt": b"na\xefve"},
        {"txt": b"fine", "json": b"{broken"},
        {"json": b'{"captions": ["half \\ud800 a pair"]}'},
        {"json": b"{}"},
        {"txt": b"also good"},
    ]
    stream = iter_captions(shards(tmp_path, samples))
    assert list(stream) == ["good", "also good"]
    assert stream.skipped == {"caption_utf8": 2, "metadata_json": 1, "no_caption": 1}


def test_limit(tmp_path):
    paths = shards(tmp_path, [{"txt": f"caption {n}".encode()} for n in range(10)])
    stream = iter_captions(paths, limit=4)
    assert list(stream) == [f"caption {n}" for n in range(4)]
    assert stream.num_captions == 4
    assert list(iter_captions(paths, limit=0)) == []


def test_a_cut_shard_gives_what_is_whole_and_counts_the_rest(tmp_path):
    (path,) = shards(tmp_path, [{"txt": f"caption {n}".encode()} for n in range(3)])
    path.write_bytes(path.read_bytes()[: 2 * 2048 + 512])
    stream = iter_captions([path])
    assert list(stream) == ["caption 0", "caption 1"]
    assert sum(stream.skipped.values()) == 1


def test_a_missing_or_useless_shard_is_an_error(tmp_path):
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="no usable sample"):
        list(iter_captions([tmp_path / "zeros.tar"]))
    with pytest.raises(DataError, match="cannot be opened"):
        list(iter_captions([tmp_path / "missing.tar"]))
