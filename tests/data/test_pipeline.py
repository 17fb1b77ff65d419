import json

import numpy as np
import pytest
from data_fixtures import BAD, COUNTS, DROPPED, NUM_STEPS, G, loader_of, stream_of, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.mixture import Places
from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ShardSource(shards=str(write_dataset(tmp_path_factory.mktemp("data"), COUNTS, bad=BAD)))


@pytest.fixture(scope="module")
def selection(source):
    mask = np.ones(len(source), bool)
    mask[list(DROPPED)] = False
    return Selection.from_mask(mask, manifest=source.fingerprint)


@pytest.fixture(scope="module")
def reference(source, selection):
    return stream_of([loader_of(source, selection)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 8])
def test_the_stream_is_the_same_for_any_topology(source, selection, reference, world_size, workers):
    loaders = [loader_of(source, selection, rank, world_size, workers) for rank in range(world_size)]
    assert stream_of(loaders) == reference


def test_the_stream_holds_what_it_should(source, selection, reference):
    uids = np.frombuffer(b"".join(step["uids"] for step in reference), np.uint8).reshape(-1, 16)
    num_kept = len(selection)
    assert len(uids) == G * NUM_STEPS > 2 * num_kept  # so every kept sample came up at least twice
    rows = {source.manifest.uids()[row].tobytes(): row for row in range(len(source))}
    seen = [rows[uid.tobytes()] for uid in uids]
    assert set(seen) == set(range(len(source))) - set(DROPPED) - set(BAD)
    errors = [error for step in reference for error in step["errors"]]
    assert {error["row"] for error in errors} == set(BAD)
    assert all(error["reason"] == "image_truncated" and error["shard"].endswith(".tar") for error in errors)
    # 3 follows 2; 17 and 30 are the last of their shards, of which 11 and 19 are the first that the selection keeps
    assert {error["row"]: error["replaced_by"] for error in errors} == {2: 3, 17: 11, 30: 19}


def test_twin_an_order_that_workers_own_is_not_the_same(source, selection):
    """What the exactness test must be able to see: a shuffle drawn from the worker's own generator."""

    class WorkerKeyed(TrainLoader):
        def __init__(self, rank, world_size):
            base = loader_of(source, selection, rank, world_size)
            self.__dict__ = base.__dict__
            mine = np.arange(rank, len(selection), world_size)
            shuffled = np.random.default_rng(rank).permutation(mine)
            rows = np.flatnonzero(selection.mask())[shuffled]
            self._steps.mixture.locate = lambda positions: Places(
                positions * 0, positions * 0, rows[positions % len(rows)], np.ones(len(positions), np.float32)
            )

    one = stream_of([WorkerKeyed(0, 1)])
    two = stream_of([WorkerKeyed(rank, 2) for rank in range(2)])
    assert [step["uids"] for step in one] != [step["uids"] for step in two]


def test_twin_pixels_from_a_workers_generator_are_not_the_same(source, selection, reference, monkeypatch):
    generator = np.random.default_rng(0)
    monkeypatch.setattr("vlm_train.data.collate.keyed_generator", lambda *key: generator)
    loaders = [loader_of(source, selection, rank, 2) for rank in range(2)]
    found = stream_of(loaders)
    assert [step["uids"] for step in found] == [step["uids"] for step in reference]
    assert [step["images"] for step in found] != [step["images"] for step in reference]


@pytest.mark.parametrize(("before", "after", "workers"), [(3, 2, 0), (2, 5, 2), (1, 8, 0), (7, 1, 2)])
def test_resumes_at_another_world_size(source, selection, reference, before, after, workers):
    loaders = [loader_of(source, selection, rank, before, workers) for rank in range(before)]
    first = stream_of(loaders, 4)  # workers have prefetched further by now
    states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders}
    assert len(states) == 1 and len(min(states)) < 1000
    state = json.loads(states.pop())
    assert state["consumed"] == 4 * G and state["epoch"] == [4 * G // len(selection)]
    resumed = [loader_of(source, selection, rank, after, workers) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(state)
        assert len(loader) == NUM_STEPS
    assert first + stream_of(resumed) == reference


def test_a_finished_stream_gives_nothing_more(source, selection):
    loader = loader_of(source, selection)
    assert len(list(loader)) == NUM_STEPS and list(loader) == []
    longer = loader_of(source, selection, num_steps=NUM_STEPS + 1)
    longer.load_state_dict(loader.state_dict())
    assert [batch["step"] for batch in longer] == [NUM_STEPS]


def test_a_state_of_another_stream_is_refused(source, selection, tmp_path):
    state = loader_of(source, selection).state_dict()
    other = ShardSource(shards=str(write_dataset(tmp_path, (12, 12, 12))))
    for name, loader in {
        "seed": loader_of(source, selection, seed=6),
        "global_batch": loader_of(source, selection, global_batch=10),
        "selection": loader_of(source, Selection.all(len(source))),
        "manifest": loader_of(other, Selection.from_mask(selection.mask())),
        "order": loader_of(source, selection, shuffle_window=3),
    }.items():
        with pytest.raises(CheckpointError, match=f"`{name}` differs"):
            loader.load_state_dict(state)
    with pytest.raises(CheckpointError, match="`order` differs"):
        loader_of(source, selection, epoch_end="drop").load_state_dict(state)
    loader = loader_of(source, selection)
    with pytest.raises(CheckpointError, match="`version` differs"):
        loader.load_state_dict({**state, "version": 1})
    for consumed in (G - 1, -G, None, "0"):
        with pytest.raises(CheckpointError, match="consumed"):
            loader.load_state_dict({**state, "consumed": consumed})


def test_prefetched_batches_are_not_consumed(source, selection):
    loader = loader_of(source, selection, workers=2)
    stream = iter(loader)
    assert loader.state_dict()["consumed"] == 0
    assert next(stream)["step"] == 0 and loader.state_dict()["consumed"] == G
    assert next(stream)["step"] == 1 and loader.state_dict()["consumed"] == 2 * G
    stream.close()


@settings(max_examples=12, deadline=None)
@given(world_size=st.integers(1, 9), global_batch=st.integers(9, 60), end=st.sampled_from(["wrap", "pad_zero_weight"]))
def test_any_batch_on_any_world_size(source, selection, world_size, global_batch, end):
    spec = {"global_batch": global_batch, "num_steps": 2, "epoch_end": end}
    loaders = [loader_of(source, selection, rank, world_size, **spec) for rank in range(world_size)]
    assert stream_of(loaders) == stream_of([loader_of(source, selection, **spec)])


def test_padding_rows_have_no_weight_and_no_content(source):
    everything = Selection.all(len(source))
    batches = list(loader_of(source, everything, global_batch=25, num_steps=2, epoch_end="pad_zero_weight"))
    assert [int(batch["weights"].sum()) for batch in batches] == [25, 11]
    blank = batches[1]["weights"] == 0
    assert not batches[1]["images"][blank].any() and not batches[1]["uids"][blank].any()
    assert len({uid for batch in batches for uid in batch["keys"]} - {""}) == len(source) - len(BAD)


def test_what_does_not_fit_is_refused(source, selection):
    with pytest.raises(ConfigError, match="smaller than the number of ranks"):
        loader_of(source, selection, world_size=12)
    with pytest.raises(DataError, match="other data"):
        loader_of(source, Selection.all(5))
    with pytest.raises(DataError, match="other data"):
        loader_of(source, Selection.from_mask(np.ones(len(source), bool), manifest="abc"))
    with pytest.raises(DataError, match="smaller than one global batch") as caught:
        loader_of(source, selection, global_batch=100, epoch_end="drop")
    assert "global_batch" in caught.value.remedy


def test_a_shard_of_which_nothing_is_left_is_replaced_by_the_next(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (3, 3, 3))))
    (tmp_path / "00001.tar").unlink()
    loader = loader_of(source, Selection.all(9), global_batch=9, num_steps=1)
    (batch,) = loader
    assert [error["replaced_by"] for error in batch["errors"]] == [6, 6, 6]
    assert {error["reason"] for error in batch["errors"]} == {"shard_unreadable"}
    for name in ("00000.tar", "00002.tar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="no sample near") as caught:
        list(loader_of(source, Selection.all(9), workers=1))
    assert "tried in its place: {'shard_changed': 5, 'shard_unreadable': 1}" in str(caught.value.got)
