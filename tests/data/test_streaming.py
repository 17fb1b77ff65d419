"""Tars read from front to back: the same stream for any number of ranks and workers, and after a restart."""

import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from data_fixtures import G, members_of, merged, train_encoder, write_dataset, write_tar

from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import StreamSpec
from vlm_train.data.streaming import TapeSteps, tars
from vlm_train.data.tape import ShuffledTapes, read_shard
from vlm_train.errors import CheckpointError, ConfigError, DataError

COUNTS, BAD = (11, 7, 13, 5), (2, 17, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_dataset(tmp_path_factory.mktemp("tapes"), COUNTS, bad=BAD)
    packed = path / "00001.tar"
    (path / "00001.tar.gz").write_bytes(gzip.compress(packed.read_bytes()))
    return path


def shards_of(folder):
    names = ("00000.tar", "00001.tar.gz", "00002.tar", "00003.tar")
    return [str(folder / name) for name in names]


def loader_of(folder, rank=0, world_size=1, workers=0, *, buffer=8, num_steps=9, **spec):
    stream = StreamSpec(seed=5, global_batch=G, num_steps=num_steps, epoch_end="wrap", **spec)
    steps = TapeSteps(
        shards_of(folder), stream, buffer=buffer, encoder=train_encoder(), rank=rank, world_size=world_size
    )
    return TrainLoader(steps=steps, num_workers=workers)


def stream_of(loaders, num=None):
    return [merged(batches) for batches in itertools.islice(zip(*loaders, strict=True), num)]


@pytest.fixture(scope="module")
def reference(folder):
    return stream_of([loader_of(folder)])


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 2), (5, 0), (7, 1)])
def test_the_stream_is_the_same_for_any_topology(folder, reference, world_size, workers):
    loaders = [loader_of(folder, rank, world_size, workers) for rank in range(world_size)]
    assert stream_of(loaders) == reference


def test_an_epoch_holds_every_sample_once_and_bad_ones_are_named(folder, reference):
    keys = [key for step in reference for key in step["keys"]]
    good = {f"{shard:02d}{n:04d}" for shard, n in _numbers() if n not in BAD}
    assert set(keys[: sum(COUNTS)]) == good
    errors = [error for step in reference for error in step["errors"]]
    named = {error["key"] for error in errors if error["reason"] == "image_truncated"}
    assert named == {f"{shard:02d}{n:04d}" for shard, n in _numbers() if n in BAD}
    assert keys[:36] != keys[36:72]  # another order in the next epoch


def _numbers():
    number = 0
    for shard, count in enumerate(COUNTS):
        for _ in range(count):
            yield shard, number
            number += 1


@pytest.mark.parametrize(("before", "after", "workers", "at"), [(1, 2, 0, 2), (3, 1, 1, 4), (2, 5, 0, 7)])
def test_resumes_at_another_world_size(folder, reference, before, after, workers, at):
    loaders = [loader_of(folder, rank, before, workers) for rank in range(before)]
    first = stream_of(loaders, at)
    states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders}
    assert len(states) == 1 and len(min(states)) < 1000
    resumed = [loader_of(folder, rank, after, workers) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(json.loads(min(states)))
    # which decodable sample stands in for a bad one looks back within the epoch, so nothing differs
    assert first + stream_of(resumed) == reference


def test_twin_a_shuffle_that_forgets_the_epoch_is_not_the_same(folder, reference, monkeypatch):
    whole = ShuffledTapes.epoch
    monkeypatch.setattr(ShuffledTapes, "epoch", lambda self, number, errors: whole(self, 0, errors))
    assert [step["keys"] for step in stream_of([loader_of(folder)])] != [step["keys"] for step in reference]


def test_a_compressed_tar_holds_what_the_plain_one_does(folder):
    samples = [[s.uid for s in read_shard(str(folder / f"00001.tar{end}"), [])] for end in ("", ".gz")]
    assert (
        samples[0]
        == samples[1]
        == [uid.tobytes() for uid in ShardSource(shards=str(folder / "00001.tar")).manifest.uids()]
    )


def test_damage_costs_what_it_costs_and_is_recorded(tmp_path):
    path = write_dataset(tmp_path, (5,)) / "00000.tar"
    content = path.read_bytes()
    for data, name in ((content[: len(content) // 2], "cut.tar"), (gzip.compress(content)[:-400], "cut.tar.gz")):
        (tmp_path / name).write_bytes(data)
        errors = []
        found = [sample.key for sample in read_shard(str(tmp_path / name), errors)]
        assert 0 < len(found) < 5 and found == [f"00000{i}" for i in range(len(found))]
        assert errors and errors[-1]["reason"] == "truncated"


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_every_compression_gives_the_same_samples(tmp_path, codec):
    path = write_dataset(tmp_path, (5,)) / "00000.tar"
    with pa.CompressedOutputStream(pa.OSFile(str(tmp_path / "packed"), "wb"), codec) as packed:
        packed.write(path.read_bytes())
    found = [[sample.uid for sample in read_shard(str(tmp_path / name), [])] for name in ("00000.tar", "packed")]
    assert found[0] == found[1] and len(found[0]) == 5


def test_a_stream_without_its_end_is_noticed(tmp_path):
    """At a block's boundary nothing but the missing end block shows that something is missing."""
    path = write_dataset(tmp_path, (5,)) / "00000.tar"
    source = ShardSource(shards=str(path))
    last = source.manifest.entries(np.array([3]))[0]
    cut = int(last["offset"])
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:cut])
    errors = []
    keys = [sample.key for sample in read_shard(str(tmp_path / "cut.tar"), errors)]
    indexed = ShardSource(shards=str(tmp_path / "cut.tar")).manifest
    assert keys == indexed.table(["key"])["key"].to_pylist() == ["000000", "000001"]
    assert errors == indexed.errors() == [{"shard": "cut.tar", "key": "000002", "reason": "no_end_marker"}]


def test_samples_that_cannot_be_used_are_left_out_with_the_words_of_indexing(tmp_path):
    members = [
        *members_of("a", 0),
        *members_of("b", 1, caption=b"\xff"),
        *members_of("c", 2, image=b"no image"),
        ("d.txt", b"alone"),
        *members_of("a", 3),
    ]
    errors = []
    path = write_tar(tmp_path / "a.tar", members)
    assert [sample.key for sample in read_shard(str(path), errors)] == ["a"]
    index = ShardSource(shards=str(path)).manifest.errors()
    assert errors == index and len(errors) == 4


def test_what_a_stream_cannot_do_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="epoch ends"):
        TapeSteps(
            shards_of(folder),
            StreamSpec(seed=0, global_batch=4, num_steps=1),
            buffer=0,
            encoder=train_encoder(),
            rank=0,
            world_size=1,
        )
    (tmp_path / "a.beton").write_bytes(b"x")
    with pytest.raises(ConfigError, match="only tars"):
        tars(str(tmp_path / "a.beton"))
    state = loader_of(folder).state_dict()
    with pytest.raises(CheckpointError, match="`buffer` differs"):
        loader_of(folder, buffer=9).load_state_dict(state)
    with pytest.raises(CheckpointError, match="`shards` differs"):
        loader_of(folder).load_state_dict(state | {"shards": "0" * 64})
    for place in ({"epoch": None}, {"epoch": -1}, {"epoch": 1.0}, {"epoch_start": True}, {"epoch_start": "0"}):
        with pytest.raises(CheckpointError, match="no place in a stream"):
            loader_of(folder).load_state_dict(state | place)
    write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(DataError, match=r"no usable sample(.|\n)*a.tar a: no_image"):
        list(ShuffledTapes([str(tmp_path / "a.tar")], seed=0, buffer=4).epoch(0, []))


def test_the_last_good_sample_stands_in_at_most_32_places_back(tmp_path):
    """Samples 0, 2, 3, and 5 to 40 do not decode."""
    bad = {0, 2, 3, *range(5, 41)}
    shard = write_dataset(tmp_path, (44,), bad=bad) / "00000.tar"
    stream = StreamSpec(seed=5, global_batch=44, num_steps=1, epoch_end="wrap")
    steps = TapeSteps(str(shard), stream, buffer=0, encoder=train_encoder(), rank=0, world_size=1)
    batch = steps.batch(0)
    numbers = [int(key) if key else None for key in batch["keys"]]
    assert numbers == [None, 1, 1, 1, *[4] * 33, *[None] * 4, 41, 42, 43]
    assert [row for row, weight in enumerate(batch["weights"].tolist()) if not weight] == [0, 37, 38, 39, 40]
    stood_in = {int(error["key"]): error["replaced_by"] for error in batch["errors"]}
    assert stood_in.keys() == bad and stood_in[3] == "000001" and stood_in[36] == "000004" and stood_in[37] is None


def test_a_step_longer_than_an_epoch_and_a_start_in_the_middle_of_one(tmp_path):
    shard = write_dataset(tmp_path, (5,)) / "00000.tar"
    stream = StreamSpec(seed=5, global_batch=13, num_steps=4, epoch_end="wrap")

    def loader():
        return TrainLoader(
            steps=TapeSteps(str(shard), stream, buffer=3, encoder=train_encoder(), rank=0, world_size=1), num_workers=0
        )

    whole = stream_of([loader()])
    counts = np.unique([key for step in whole for key in step["keys"]], return_counts=True)[1]
    assert counts.sum() == 52 and counts.max() - counts.min() <= 1
    for at in (1, 2, 3):
        first, later = loader(), loader()
        before = stream_of([first], at)
        later.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + stream_of([later]) == whole
        assert stream_of([first]) == whole[at:]  # also one that is asked again
