"""A run that leaves data out reads the stream further on, under its own step numbers, and says so in its state."""

import itertools
import json

import pytest
from data_fixtures import COUNTS, G, loader_of, merged, write_dataset

from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import CheckpointError

JUMPS, PLACES = [(1, 3), (4, 9)], [0, 3, 4, 5, 9, 10]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ShardSource(shards=str(write_dataset(tmp_path_factory.mktemp("data"), COUNTS)))


def jumping(source, jumps, rank=0, world_size=1, workers=0):
    steps = loader_of(source, Selection.all(len(source)), rank, world_size)._steps
    return TrainLoader(steps=steps, num_workers=workers, jumps=jumps)


def told(loaders, num=None):
    batches = itertools.islice(zip(*loaders, strict=True), num)
    return [merged([{**batch} for batch in together]) for together in batches]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (3, 2)])
def test_the_steps_jump_in_the_stream_and_go_on_after_a_resume(source, ranks, workers):
    plain = told([loader_of(source, Selection.all(len(source)), num_steps=11)])
    expected = [plain[place] | {"step": step} for step, place in enumerate(PLACES)]
    loaders = [jumping(source, JUMPS, rank, ranks, workers) for rank in range(ranks)]
    first = told(loaders, 2)
    states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders}
    assert len(states) == 1 and len(min(states)) < 1000
    state = json.loads(states.pop())
    assert (state["consumed"], state["skipped"]) == (2 * G, 2 * G)
    assert state["epoch"] == [4 * G // sum(COUNTS)]  # of the place in the stream
    resumed = jumping(source, JUMPS)
    resumed.load_state_dict(state)
    assert first + told([resumed]) == expected != plain[: len(PLACES)]


def test_a_state_that_left_out_other_data_is_refused(source):
    loader = jumping(source, JUMPS)
    told([loader], 3)
    for jumps in ([], [(1, 2)], [(3, 5)]):
        with pytest.raises(CheckpointError, match=r"left out other data(.|\n)*events.jsonl"):
            jumping(source, jumps).load_state_dict(loader.state_dict())
    jumping(source, JUMPS[:1]).load_state_dict(loader.state_dict())  # a jump that is still to come
    old = {key: value for key, value in jumping(source, []).state_dict().items() if key != "skipped"}
    jumping(source, JUMPS).load_state_dict(old)  # of a version that left nothing out
