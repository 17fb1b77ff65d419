"""One stream of samples and pixels, whatever reads it: ranks, workers, format, selection, interruptions.

Each example draws a whole life of a run: it starts on some number of ranks, stops at a random step, goes on elsewhere
from the JSON of its state, and so on. Its global batches must be those of one process that was never stopped.
"""

import functools
import itertools
import json

import numpy as np
import pytest
from data_fixtures import encoded, members_of, merged, mixture_loader, pixels, write_dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlm_train.data.beton import BetonWriter
from vlm_train.data.cumulative import Bits
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient

COUNTS, BAD, STEPS = (9, 14, 6, 11), (3, 22), 6
WORLDS = (1, 2, 3, 5, 7, 8)
LIFE = st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 3)), min_size=1, max_size=4)


def write_beton(path, start, count):
    with BetonWriter(path, count) as writer:
        for number in range(start, start + count):
            image = encoded(pixels(number))
            members = members_of(f"b{number}", number, image=image[:-30] if number - start in BAD else image)
            writer.write(f"b{number}", {name.partition(".")[2]: content for name, content in members})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same number of samples as tars and as .beton files, of different pictures."""
    folder = tmp_path_factory.mktemp("exact")
    tar = ShardSource(shards=str(write_dataset(folder / "tar", COUNTS, bad=BAD)))
    (folder / "beton").mkdir()
    for shard, count in enumerate(COUNTS):
        write_beton(folder / "beton" / f"{shard}.beton", 100 * (shard + 1), count)
    return {"tar": tar, "beton": ShardSource(shards=str(folder / "beton"))}


@st.composite
def selections(draw, num_rows):
    kind = draw(st.sampled_from(["all", "bits", "weights"]))
    if kind == "all":
        return Selection.all(num_rows)
    generator = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    if kind == "bits":
        return Selection.from_mask(generator.random(num_rows) < 0.6)
    return Selection.from_weights(generator.choice([0.0, 0.3, 1.0, 2.5], num_rows))


@st.composite
def recipes(draw, kinds=("tar", "beton", "mixture")):
    """What defines a stream: sources, selections, weights, batch, seed, window."""
    kind, num_rows = draw(st.sampled_from(kinds)), sum(COUNTS)
    names = ("tar", "beton") if kind == "mixture" else (kind,)
    return {
        "members": {name: (draw(selections(num_rows)), draw(st.sampled_from([1.0, 0.3, 2.5]))) for name in names},
        "global_batch": draw(st.integers(max(WORLDS), 29)),
        "seed": draw(st.integers(0, 99)),
        "shuffle_window": draw(st.integers(0, 5)),
        "pure_batches": draw(st.booleans()),
    }


def loaders_of(sources, recipe, world_size, workers=0):
    recipe = {**recipe, "num_steps": STEPS, "epoch_end": "wrap"}
    ingredients = [
        Ingredient(source=sources[name], selection=selection, weight=weight, name=name)
        for name, (selection, weight) in recipe.pop("members").items()
    ]
    return [mixture_loader(ingredients, rank, world_size, workers, **recipe) for rank in range(world_size)]


def live(make, life):
    """The global batches of a run that lives `life`: (ranks, steps before the next stop); the last part ends it."""
    found, state = [], None
    for number, (world_size, num_steps) in enumerate(life):
        loaders = make(world_size)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        last = number == len(life) - 1
        streams = [iter(loader) for loader in loaders]
        steps = itertools.islice(zip(*streams, strict=True), None if last else num_steps)
        found += [merged(batches) for batches in steps]
        states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders}
        for stream in streams:
            stream.close()
        assert len(states) == 1
        (state,) = states
        assert len(state) < 1000
    return found


@settings(max_examples=40, deadline=None)
@given(recipe=recipes(), life=LIFE)
def test_any_life_of_a_run_gives_the_stream_of_one_process(sources, recipe, life):
    make = functools.partial(loaders_of, sources, recipe)
    reference = live(make, [(1, 0)])
    assert len(reference) == STEPS and all(len(step["keys"]) == recipe["global_batch"] for step in reference)
    assert live(make, life) == reference


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes(), life=st.lists(st.tuples(st.sampled_from(WORLDS[:3]), st.integers(0, 3)), min_size=2, max_size=2),  # noqa: E501

       workers=st.integers(1, 4))  # fmt: skip
def test_workers_change_nothing_either(sources, recipe, life, workers):
    make = functools.partial(loaders_of, sources, recipe)
    assert live(functools.partial(make, workers=workers), life) == live(make, [(1, 0)])


@settings(max_examples=6, deadline=None)
@given(recipe=recipes(("tar", "mixture")), world_size=st.sampled_from(WORLDS))
@example(recipe={"members": {"tar": (Selection.all(sum(COUNTS)), 1.0)}, "global_batch": 20, "seed": 0,
                 "shuffle_window": 2}, world_size=3)  # fmt: skip
def test_the_bad_samples_are_met_and_replaced(sources, recipe, world_size):
    """Otherwise the streams above could be equal without a bad sample ever having come."""
    make = functools.partial(loaders_of, sources, recipe)
    reports = [error for step in live(make, [(world_size, 0)]) for error in step["errors"]]
    reports = [error for error in reports if error["shard"].endswith(".tar")]
    (loader,) = make(1)
    places = loader._steps.mixture.locate(np.arange(STEPS * recipe["global_batch"]))
    rows = places.rows[places.sources == list(recipe["members"]).index("tar")].tolist()
    selection, _ = recipe["members"]["tar"]
    assert [error["row"] for error in reports] == [row for row in rows if row in BAD]
    assert all(error["replaced_by"] not in BAD for error in reports)
    if isinstance(selection.content, Bits) and len(rows) >= 2 * len(selection):
        assert {error["row"] for error in reports} == set(BAD) & set(np.flatnonzero(selection.mask()))


@pytest.mark.parametrize("wrong", ["the step is lost", "prefetched counts as consumed", "the rank keys the pixels"])
def test_wrong_twins_are_seen(sources, wrong):
    members = {name: (Selection.all(sum(COUNTS)), 1.0) for name in ("tar", "beton")}
    recipe = {"members": members, "global_batch": 11, "seed": 1, "shuffle_window": 2}
    make = functools.partial(loaders_of, sources, recipe)
    reference, life = live(make, [(1, 0)]), [(3, 2), (2, 2), (1, 0)]
    assert live(make, life) == reference

    def twin(world_size):
        loaders = make(world_size)
        for rank, loader in enumerate(loaders):
            if wrong == "the rank keys the pixels":
                _key_by_rank(loader, rank)
                continue
            lag = -11 if wrong == "the step is lost" else 11
            honest = loader.state_dict
            shifted = lambda honest=honest, lag=lag: {**honest(), "consumed": max(0, honest()["consumed"] + lag)}  # noqa: E731
            loader.state_dict = shifted
        return loaders

    found = live(twin, life)
    assert found != reference
    if wrong == "the rank keys the pixels":
        assert [step["uids"] for step in found] == [step["uids"] for step in reference]


def _key_by_rank(loader, rank):
    put = loader._steps._put
    loader._steps._put = lambda draft, place, sample, visit: put(draft, place, sample, visit + 1000 * rank)
