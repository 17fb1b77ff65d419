"""Samples of none, one and several images on their way to a model that reads dialogues, and to models that do not."""

from __future__ import annotations

import itertools
import json
from functools import partial

import numpy as np
import pytest
import several_images as toys
import torch
from data_fixtures import encoded, loader_of, pixels, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data import places
from vlm_train.data.convert import convert
from vlm_train.data.decode import SampleError, open_image
from vlm_train.data.indexing import open_manifest
from vlm_train.data.pipeline import EvalLoader, TrainLoader
from vlm_train.data.rendering import render
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.stats import statistics
from vlm_train.data.steps import Ingredient, StreamSpec, TrainSteps
from vlm_train.data.streaming import TapeSteps
from vlm_train.data.tape import read_shard
from vlm_train.data.transforms import keyed_generator
from vlm_train.imaging import recolour
from vlm_train.models.connectors.linear import MLPConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import Batch

COUNTS, BAD, G, NUM_STEPS = (11, 7, 13), (2, 13, 19), 9, 8
WORLDS = ((2, 0), (3, 2), (5, 0), (1, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.write_mixed(tmp_path_factory.mktemp("mixed"), COUNTS, bad=BAD)


def drawn(made, raw, data, stage, *, seed, visit):
    """The square of one image, by decoder, transform and colours alone."""
    image = open_image(data)
    plan = made.transform.plan(image.width, image.height, keyed_generator(seed, visit, raw.uid, stage))
    width, height = plan.min_decoded
    square = render(image.decode(min_width=width, min_height=height, fast=True), plan)
    return recolour(torch.from_numpy(square).permute(2, 0, 1)[None], torch.tensor([plan.colours]))[0]


def test_todays_streams_do_not_change():
    """Of a sample with one image the pixels are those that models without dialogues see, whatever else has room."""
    raws = [toys.raw_of(toys.parts_of(seed, 1)) for seed in range(4)]
    key = {"seed": 3, "visit": 7}
    alone = toys.batch_of(toys.encoder(None), raws, **key)["images"]
    one = toys.batch_of(toys.encoder(toys.dialogues(1)), raws, **key)
    three = toys.batch_of(toys.encoder(toys.dialogues(3)), raws, **key)
    assert alone.shape == (4, 3, 16, 16) and torch.equal(one["images"], alone)
    assert alone.is_contiguous(memory_format=torch.channels_last)
    assert three["images"].shape == (4, 3, 3, 16, 16) and torch.equal(three["images"][:, 0], alone)
    assert not three["images"][:, 1:].any() and three["num_images"].tolist() == [1] * 4


def test_each_image_has_draws_of_its_own():
    parts = toys.parts_of(0, 3)
    parts |= {f"{place}.jpg": parts["0.jpg"] for place in range(3)}  # one picture three times
    made, raw = toys.encoder(toys.dialogues()), toys.raw_of(parts)
    images = toys.batch_of(made, [raw], seed=3, visit=7)["images"][0]
    for place, stage in enumerate(("image", "image 1", "image 2")):
        assert torch.equal(images[place], drawn(made, raw, parts["0.jpg"], stage, seed=3, visit=7))
    twin = drawn(made, raw, parts["0.jpg"], "image", seed=3, visit=7)  # the draws of the first for all
    assert not torch.equal(images[1], twin) and not torch.equal(images[2], twin)


def test_images_come_in_the_order_of_their_numbers():
    parts = toys.parts_of(0, 0, toys.said(4))
    names = ["10.jpg", "2.png", "0.jpg", "jpg"]
    kinds = {"png": "PNG", "jpg": "JPEG"}
    parts |= {name: encoded(pixels(seed), kinds[name[-3:]]) for seed, name in enumerate(names)}
    images = toys.batch_of(toys.encoder(toys.dialogues(4), train=False), [toys.raw_of(parts)])["images"][0]
    alone = [toys.raw_of({"jpg": parts[name], "txt": b"x"}) for name in ("jpg", "0.jpg", "2.png", "10.jpg")]
    assert torch.equal(images, toys.batch_of(toys.encoder(None, train=False), alone)["images"])
    assert not torch.equal(images[0], images[1])


def test_what_a_row_has_not_is_blank_whatever_lay_there(monkeypatch):
    """Room is not cleared beforehand, and a sample whose second image is bad has left its first one there."""
    monkeypatch.setattr(places, "_room", lambda shape: torch.full(shape, 201, dtype=torch.uint8))
    bad = toys.parts_of(0, 3)
    bad["2.jpg"] = bad["2.jpg"][:-30]
    draft = toys.encoder(toys.dialogues()).draft(3)
    for row in (0, 1):
        with pytest.raises(SampleError, match="image_truncated"):
            draft.put(row, toys.raw_of(bad), seed=1, visit=1)
    draft.put(0, toys.raw_of(toys.parts_of(1, 1)), seed=1, visit=1)
    draft.put(2, toys.raw_of(toys.parts_of(2, 0)), seed=1, visit=1)
    batch = draft.batch(weights=[1, 0, 1])
    assert batch["images"][0, 0].any() and not batch["images"][0, 1:].any() and not batch["images"][1:].any()
    assert batch["num_images"].tolist() == [1, 0, 0] and batch["keys"] == ["k", "", "k"]


def test_colours_of_several_images_are_not_left_to_the_trainer():
    raws = [toys.raw_of(toys.parts_of(seed, 2)) for seed in range(3)]
    now, later = (toys.encoder(toys.dialogues(), colours_later=later) for later in (False, True))
    here, there = (toys.batch_of(made, raws, seed=1, visit=2) for made in (now, later))
    assert "finish" not in there and torch.equal(here["images"], there["images"])
    one = toys.encoder(toys.dialogues(1), colours_later=True)
    assert toys.batch_of(one, [toys.raw_of(toys.parts_of(0, 1))], visit=0)["finish"].shape == (1, 3)


def reason(made, parts):
    with pytest.raises(SampleError) as caught:
        toys.batch_of(made, [toys.raw_of(parts)])
    return caught.value.reason


def test_texts_alone_are_a_sample_for_who_reads_dialogues_and_for_nobody_else():
    texts = toys.parts_of(0, 0)
    for max_images, shape in ((1, (1, 3, 16, 16)), (3, (1, 3, 3, 16, 16))):
        batch = toys.batch_of(toys.encoder(toys.dialogues(max_images), contents=True), [toys.raw_of(texts)])
        assert batch["images"].shape == shape and not batch["images"].any()
        assert batch["num_images"].tolist() == [0] and batch["contents"][0, 0] == -1 < batch["contents"][0, 1]
    assert reason(toys.encoder(None), texts) == "no_image"
    assert reason(toys.encoder(toys.dialogues(template="plain")), texts) == "no_image"  # it learns captions of images


def test_images_and_what_is_said_of_them_must_agree():
    made = toys.encoder(toys.dialogues())
    assert reason(made, toys.parts_of(0, 0, toys.said(2))) == "no_image"
    assert reason(made, {"txt": b"a star"}) == "no_image"  # no dialogue: the caption of an image that is not there
    assert reason(made, toys.parts_of(0, 2, toys.said(1))) == "dialogue_image_count"
    assert reason(made, toys.parts_of(0, 1, toys.said(0))) == "dialogue_image_count"
    assert reason(made, toys.parts_of(0, 4)) == "dialogue_many_images"
    assert reason(toys.encoder(toys.dialogues(template="plain")), toys.parts_of(0, 2)) == "dialogue_image_count"
    several = toys.batch_of(toys.encoder(None), [toys.raw_of(toys.parts_of(0, 2))])  # without dialogues: the first
    assert several["images"].shape == (1, 3, 16, 16)


def tiny_model(max_images):
    torch.manual_seed(0)
    vision = VisionTransformer(image={"size": 16}, patch_size=16, width=16, num_layers=1, num_heads=2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 160, "initializer_range": 0.5}
    text = CausalLanguageModel(spec=toys.tokenizer().spec, architecture=sizes)
    model = GenerativeModel(
        vision=vision, connector=partial(MLPConnector, num_layers=1), text=text, context_length=160,
        max_images=max_images, drop_class_token=False,
    )  # fmt: skip
    return model.eval()


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_any_numbers_of_images_meet_in_a_batch_and_change_nothing_of_each_other(counts, seed):
    made, model = toys.encoder(toys.dialogues()), MODEL
    assert model.tokens_per_image == toys.NUM_IMAGE_TOKENS
    raws = [toys.raw_of(toys.parts_of(10 * seed + row, count)) for row, count in enumerate(counts)]
    batch = toys.batch_of(made, raws, seed=seed, visit=1)
    assert batch["num_images"].tolist() == counts and batch["images"].shape == (len(counts), 3, 3, 16, 16)
    there = batch["images"].flatten(2).any(dim=2)
    assert there.tolist() == [[place < count for place in range(3)] for count in counts]
    with torch.no_grad():
        hidden = model(batch)["token_hidden"]
        for row, raw in enumerate(raws):
            alone = toys.batch_of(made, [raw], seed=seed, visit=1)
            assert torch.equal(alone["images"][0], batch["images"][row])
            length = int(alone["dialogue_lengths"])
            torch.testing.assert_close(model(alone)["token_hidden"][0, :length], hidden[row, :length])
        if max(counts) > 1:  # another second image is another answer
            row = counts.index(max(counts))
            other = Batch(**batch)
            other["images"] = batch["images"].clone()
            other["images"][row, 1] = 255 - other["images"][row, 1]
            moved = (model(other)["token_hidden"] - hidden).abs().amax((1, 2))
            assert moved[row] > 1e-3 and moved.argmax() == row and (moved > 1e-4).sum() == 1


MODEL = tiny_model(3)


def loaders(source, world_size, workers, made, **spec):
    spec = {"shuffle_window": 2, **spec}
    stream = StreamSpec(seed=5, global_batch=G, num_steps=NUM_STEPS, epoch_end="wrap", **spec)
    ingredients = [Ingredient(source=source, selection=Selection.all(len(source)))]
    steps = [TrainSteps(ingredients, stream, made, rank, world_size) for rank in range(world_size)]
    return [TrainLoader(steps=each, num_workers=workers) for each in steps]


def stream_of(found):
    return [toys.merged(list(batches)) for batches in zip(*found, strict=True)]


@pytest.mark.parametrize(("world_size", "workers"), WORLDS)
def test_the_stream_is_that_of_one_process(folder, world_size, workers):
    source, made = ShardSource(shards=str(folder)), toys.encoder(toys.dialogues())
    reference = stream_of(loaders(source, 1, 0, made))
    assert stream_of(loaders(source, world_size, workers, made)) == reference
    bad = [(error["row"], error["reason"]) for step in reference for error in step["errors"]]
    assert set(bad) == {(row, "image_truncated") for row in BAD}
    images = [np.frombuffer(step["num_images"], np.int64) for step in reference]
    assert set(np.concatenate(images).tolist()) == {0, 1, 2, 3}
    other = stream_of(loaders(source, world_size, 0, toys.encoder(toys.dialogues(), train=False)))
    assert other[0]["images"] != reference[0]["images"]  # the comparison sees pixels


def taped(folder, *, buffer, world_size=1, workers=0):
    stream = StreamSpec(seed=5, global_batch=G, num_steps=NUM_STEPS, epoch_end="wrap")
    parts = {"buffer": buffer, "encoder": toys.encoder(toys.dialogues()), "world_size": world_size}
    shards = sorted(map(str, folder.glob("*.tar")))
    steps = [TapeSteps(shards, stream, rank=rank, **parts) for rank in range(world_size)]
    return stream_of([TrainLoader(steps=each, num_workers=workers) for each in steps])


@pytest.mark.parametrize(("world_size", "workers"), WORLDS[:2])
def test_a_tape_gives_the_same_batches_for_any_topology(folder, world_size, workers):
    assert taped(folder, buffer=8, world_size=world_size, workers=workers) == taped(folder, buffer=8)


def test_a_tape_gives_the_batches_that_are_read_at_random(folder):
    in_order = loaders(ShardSource(shards=str(folder)), 1, 0, toys.encoder(toys.dialogues()), shuffle_window=0)
    for step, (streamed, read) in enumerate(zip(taped(folder, buffer=0), stream_of(in_order), strict=True)):
        rows = [(step * G + place) % sum(COUNTS) for place in range(G)]
        good = [place for place, row in enumerate(rows) if row not in BAD]  # the two have other stand-ins for bad ones
        for name, dtype in (("images", np.uint8), ("num_images", np.int64), ("uids", np.int64)):
            pair = [np.frombuffer(found[name], dtype).reshape(G, -1)[good] for found in (streamed, read)]
            assert np.array_equal(*pair)


def test_a_shard_read_in_order_holds_what_its_index_does(folder):
    for path in sorted(folder.glob("*.tar")):
        source, errors = ShardSource(shards=str(path)), []
        read = source.read(np.arange(len(source)))
        streamed = list(read_shard(str(path), errors))
        assert [(s.uid, s.key, s.parts) for s in streamed] == [(s.uid, s.key, s.parts) for s in read]
        assert not errors and any(not any("jpg" in name for name in s.parts) for s in streamed)


TEXTS = toys.parts_of(0, 0)


@pytest.mark.parametrize(
    ("parts", "left_out"),
    [
        (TEXTS, None),
        (toys.parts_of(0, 0, toys.said(1)), "no_image"),  # it was lost
        (toys.parts_of(0, 0, [{"role": "assistant", "content": "<image>"}]), "no_image"),
        (toys.parts_of(0, 0, []), "no_image"),
        (toys.parts_of(0, 0, "hello"), "no_image"),
        ({"json": b'{"captions": ["a star"], "conversations": null}'}, "no_image"),
        ({"json": b"{", "txt": b"a star"}, "no_image"),
        ({"txt": b"a star"}, "no_image"),
        ({"json": json.dumps({"conversations": toys.said(0)}).encode()}, None),  # its first answer is its caption
        ({**TEXTS, "jpg": b"no image"}, "image_unknown"),
    ],
)
def test_what_is_indexed_without_an_image(tmp_path, parts, left_out):
    members = [*toys.members_of("a", parts), *toys.members_of("b", toys.parts_of(1, 1))]
    path = write_tar(tmp_path / "a.tar", members)
    manifest = open_manifest(str(path))
    errors = [] if left_out is None else [{"shard": "a.tar", "key": "a", "reason": left_out}]
    assert manifest.errors() == errors
    taped = []
    assert len(list(read_shard(str(path), taped))) == len(manifest) and taped == errors
    sizes = manifest.table(["width", "height"]).to_pylist()
    assert sizes[:-1] == ([] if errors else [{"width": 0, "height": 0}]) and sizes[-1] == {"width": 24, "height": 20}


def test_models_without_dialogues_meet_texts_as_samples_without_an_image(folder):
    source, texts = ShardSource(shards=str(folder)), [row for row in range(sum(COUNTS)) if row % 4 == 0]

    def reports(world_size):
        found = [loader_of(source, Selection.all(len(source)), rank, world_size) for rank in range(world_size)]
        steps = itertools.islice(zip(*found, strict=True), 3)  # 33 of 31 samples, and two of the next epoch
        return [error for batches in steps for batch in batches for error in batch["errors"]]

    assert reports(3) == reports(2) == reports(1)
    told = [(error["row"], error["reason"]) for error in reports(1) if error["reason"] == "no_image"]
    assert set(told) == {(row, "no_image") for row in texts} and len(texts) <= len(told) <= len(texts) + 2
    assert all(error["replaced_by"] not in texts for error in reports(1))
    loader = EvalLoader(
        source=source, encoder=toys.encoder(None, train=False), batch_size=8, rank=0, world_size=1, num_workers=0
    )
    batches = list(loader)
    assert {error["row"] for batch in batches for error in batch["errors"] if error["reason"] == "no_image"} == set(
        texts
    )
    weights = torch.cat([batch["weights"] for batch in batches]).tolist()
    # without dialogues only the first image is read: of the bad ones that is the damaged one where there is no other
    assert [row for row, weight in enumerate(weights) if not weight] == sorted(
        {*texts, *(r for r in BAD if r % 4 == 1)}
    )


def test_evaluation_reads_them_all(folder):
    source = ShardSource(shards=str(folder))
    made = toys.encoder(toys.dialogues(), train=False)
    batches = list(EvalLoader(source=source, encoder=made, batch_size=8, rank=0, world_size=1, num_workers=0))
    weights = torch.cat([batch["weights"] for batch in batches]).tolist()
    assert [row for row, weight in enumerate(weights) if not weight] == list(BAD)
    counts = torch.cat([batch["num_images"] for batch in batches]).tolist()
    assert counts == [0 if row in BAD else row % 4 for row in range(sum(COUNTS))]


def test_texts_are_selected_counted_and_converted_like_any_sample(folder, tmp_path):
    found = statistics(str(folder))
    assert (found.num_samples, found.left_out) == (31, {}) and found.num_unreadable == sum(row % 4 == 1 for row in BAD)
    assert found.formats == {"jpg": 23} and sum(found.distributions[0].counts) == 23
    texts = write_tar(
        tmp_path / "texts.tar", [m for n in range(3) for m in toys.members_of(f"k{n}", toys.parts_of(n, 0))]
    )
    names = [each.name for each in statistics(str(texts)).distributions]
    assert names == ["caption", "sample"]
    done = convert(str(texts), tmp_path / "again")
    assert done.num_written == 3
    uids = [ShardSource(shards=str(path)).manifest.uids().tolist() for path in (texts, tmp_path / "again")]
    assert uids[0] == uids[1]
    mixed = write_tar(tmp_path / "two.tar", [*toys.members_of("a", TEXTS), *toys.members_of("b", toys.parts_of(1, 1))])
    done = convert(str(mixed), tmp_path / "two.beton")
    assert (done.num_written, done.num_errors) == (1, 1)
    assert json.loads(done.errors.read_text())["reason"] == "no_image"
