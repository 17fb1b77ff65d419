"""Tiles as one map: how many tokens a picture has, where it lies in the canvas, and that everything agrees on both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import dialogue_toys
import numpy as np
import pytest
import several_images as toys
import torch
import transformers
from data_fixtures import SPEC, encoded, pixels, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tiles import MIXED, TILES, parts_of
from transformers.image_processing_utils import select_best_resolution

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.decode import decode_metadata, open_image
from vlm_train.data.dialogue import DialogueEncoder
from vlm_train.data.tiles import as_map, as_seen, grid_of, picture_ids
from vlm_train.data.transforms import EvalTransform, TrainTransform
from vlm_train.data.verify import verify
from vlm_train.engine.flops import num_tokens
from vlm_train.engine.micro_batches import Budgets, pack_dialogues
from vlm_train.models.connectors.linear import MLPConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import IMAGE_ID, WHOLE, ImageSpec, grids_of

S, SIDE, CONTEXT = SPEC.size, 2, 2048
MAPS = replace(TILES, num_image_tokens=SIDE**2, tile_layout="map")
TILE, PATCH = 336, 14  # of LLaVA-NeXT
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
BLACK = ImageSpec(size=TILE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize="squash")
sides = st.integers(1, 4000)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """Of transformers' LLaVA-NeXT, whose pixels are those of the picture in 0..1."""
    tokenizer = dialogue_toys.byte_level(tmp_path_factory.mktemp("bytes")).inner
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=GRIDS,
        image_mean=[0.0] * 3, image_std=[1.0] * 3,
    )  # fmt: skip
    return transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def their_grid(width, height):
    rows, columns = (length // TILE for length in select_best_resolution((height, width), GRIDS))
    return as_map(WHOLE._replace(rows=rows, columns=columns), width, height, TILE // PATCH)


# Tokens


@settings(max_examples=1000, deadline=None)
@given(width=sides, height=sides)
def test_a_picture_has_as_many_tokens_as_theirs(processor, width, height):
    if select_best_resolution((height, width), GRIDS) is None:  # too thin for them
        return
    found = processor._get_num_multimodal_tokens([(height, width)])["num_image_tokens"]
    grid = their_grid(width, height)
    num_tokens = (TILE // PATCH) ** 2
    assert [grid.num_tokens(num_tokens)] == found
    assert picture_ids(grid, num_tokens, [7, 8]) == [IMAGE_ID] * found[0]  # a newline of the tokenizer is not there


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200))
def test_a_map_has_the_tiles_that_rows_have(width, height):
    grid = grid_of(width, height, MAPS)
    assert grid[:2] == grid_of(width, height, TILES)[:2]
    assert grid == as_map(grid, width, height, SIDE) and grid.is_map == (grid != WHOLE)
    turned = grid_of(height, width, MAPS)
    assert (turned.map_rows, turned.map_columns) == (grid.map_columns, grid.map_rows)
    assert grid_of(width, height, replace(TILES, num_image_tokens=SIDE**2)).is_map is False


# Pixels


@pytest.mark.parametrize("size", [(900, 500), (500, 900), (700, 672), (1500, 300), (200, 500), (90, 130)])
def test_pixels_and_tokens_are_those_of_their_processor(processor, size):
    """Measured: the same pixels. The twins: a squashed canvas, and a picture laid at its top left."""
    picture = pixels(4, *size)
    theirs = processor(images=Image.fromarray(picture), text="a <image> b", return_tensors="pt")
    grid = their_grid(*size)
    found = (theirs["input_ids"] == processor.image_token_id).sum()
    assert found == grid.num_tokens((TILE // PATCH) ** 2)
    squares = as_seen(open_image(encoded(picture, "PNG")), grid, BLACK)
    wanted = theirs["pixel_values"][0].permute(0, 2, 3, 1).numpy() * 255
    assert squares.shape == wanted.shape
    assert np.abs(squares - wanted).max() < 0.01
    in_rows = as_seen(open_image(encoded(picture, "PNG")), grid._replace(map_rows=0, map_columns=0), BLACK)
    canvas = canvas_of(squares[1:], grid)
    inside = canvas.any(axis=2)
    moved = np.roll(canvas, [-int(np.flatnonzero(inside.any(axis=axis))[0]) for axis in (1, 0)], axis=(0, 1))
    for twin in (canvas_of(in_rows[1:], grid), moved):
        assert np.abs(twin - canvas_of(wanted[1:], grid)).max() > 50


def canvas_of(squares, grid):
    """Tiles put together again."""
    return squares.reshape(grid.rows, grid.columns, *squares.shape[1:]).swapaxes(1, 2).reshape(
        grid.rows * squares.shape[1], -1, 3
    )  # fmt: skip


def mistakes(is_picture, grid, side):
    """What is wrong with a map of a canvas [H, W] of which a part shows the picture."""
    found = []
    for axis, kept, tiles in ((1, grid.map_rows, grid.rows), (0, grid.map_columns, grid.columns)):
        shown = is_picture.any(axis=axis)
        patch, cut = S // side, (tiles * side - kept) // 2
        first, last = cut * patch, (cut + kept) * patch
        if not shown[first:last].reshape(kept, patch).any(axis=1).all():
            found.append("a row of padding")
        if max(shown[:first].sum(), shown[last:].sum()) >= patch / 2 + 1:  # their rounding, and half a pixel
            found.append("a part of the picture is lost")
    return found


def red_on_blue(width, height, grid, flip=0.0):
    """Which pixels of the canvas are the picture's."""
    spec = replace(SPEC, mean=(0.0, 0.0, 1.0), resize="squash")
    red = np.full((height, width, 3), (255, 0, 0), np.uint8)
    read = DialogueEncoder("chatml", toys.tokenizer(), MAPS, system="")
    made = SampleEncoder(transform=TrainTransform(spec=spec, scale=None, flip=flip), tokenizer=toys.tokenizer(),
                         dialogues=read)  # fmt: skip
    parts = {"0.png": encoded(red, "PNG"), "json": parts_of([(1, 1)])["json"]}
    images = toys.batch_of(made, [toys.raw_of(parts)], visit=0)["images"][0, 1 : grid.num_images]
    canvas = canvas_of(images.permute(0, 2, 3, 1).numpy(), grid)
    assert set(map(tuple, canvas.reshape(-1, 3).tolist())) <= {(255, 0, 0), (0, 0, 255)}
    return canvas[..., 0] == 255


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 150), height=st.integers(1, 150), side=st.sampled_from([1, 2, 4, 8]), flip=st.booleans())
def test_no_row_is_padding_alone_and_nothing_of_the_picture_is_lost(width, height, side, flip):
    grid = as_map(grid_of(width, height, TILES), width, height, side)
    if grid != WHOLE:
        assert mistakes(red_on_blue(width, height, grid, float(flip)), grid, side) == []


def test_a_canvas_that_is_padded_at_one_end_alone_does_not_fit_its_map():
    width, height = 90, 61
    grid = as_map(grid_of(width, height, TILES), width, height, 4)
    is_picture = red_on_blue(width, height, grid)
    assert grid == (2, 3, 8, 12) or grid.map_rows < grid.rows * 4
    assert mistakes(is_picture, grid, 4) == []
    top = np.roll(is_picture, -int(np.flatnonzero(is_picture.any(axis=1))[0]), axis=0)
    assert mistakes(top, grid, 4) != []
    assert mistakes(is_picture, grid._replace(map_rows=grid.rows * 4), 4) == ["a row of padding"]


# Batches


def reader(**changes):
    return DialogueEncoder("chatml", toys.tokenizer(), replace(MAPS, **changes), system="")


def encoder(read, train=True):
    spec = replace(SPEC, resize="squash")
    transform = TrainTransform(spec=spec, scale=None) if train else EvalTransform(spec=spec)
    return SampleEncoder(transform=transform, tokenizer=toys.tokenizer(), dialogues=read)


def tiny_model():
    torch.manual_seed(0)
    vision = VisionTransformer(image={"size": S}, patch_size=S // SIDE, width=16, num_layers=1, num_heads=2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
             "initializer_range": 0.5}  # fmt: skip
    text = CausalLanguageModel(spec=toys.tokenizer().spec, architecture=sizes)
    return GenerativeModel(
        vision=vision, connector=partial(MLPConnector, num_layers=1), text=text, context_length=CONTEXT,
        max_images=3, max_tiles=TILES.max_tiles, tile_layout="map",
    ).eval()  # fmt: skip


def test_data_model_packing_and_flops_count_the_same():
    model, raws = tiny_model(), [toys.raw_of(parts_of(sizes, seed)) for seed, sizes in enumerate(MIXED)]
    assert model.dialogue == MAPS
    batch = toys.batch_of(encoder(reader()), raws)
    grids = [tuple(grid_of(*size, MAPS) for size in sizes) for sizes in MIXED]
    assert grids_of(batch) == grids and any(grid.map_rows % 2 for row in grids for grid in row) is False
    of_images = [sum(grid.num_tokens(SIDE**2) for grid in row) for row in grids]
    assert (batch["dialogue_ids"] == IMAGE_ID).sum(dim=1).tolist() == of_images
    lengths = batch["dialogue_lengths"]
    in_rows = toys.batch_of(encoder(reader(tile_layout="rows")), raws)
    words = [int(length) - int(num) * SIDE**2 for length, num in
             zip(in_rows["dialogue_lengths"], in_rows["num_images"], strict=True)]  # fmt: skip
    assert lengths.tolist() == [sum(pair) for pair in zip(words, of_images, strict=True)]
    assert torch.equal(batch["num_images"], in_rows["num_images"]) and "grids" not in in_rows
    assert num_tokens(batch) == round(sum(lengths.tolist()) / len(lengths))
    budgets = Budgets(tokens=int(lengths.max()))
    for rows in pack_dialogues(batch, budgets):
        assert sum(lengths[list(rows)].tolist()) <= int(lengths.max())
    with torch.no_grad():
        assert model(batch)["token_hidden"].isfinite().all()
    evaluated = encoder(reader(), train=False).draft(len(raws))
    for row, raw in enumerate(raws):
        evaluated.put(row, raw)
    told = evaluated.batch(weights=[1.0] * len(raws), evaluation=True)
    assert torch.equal(told["grids"], batch["grids"]) and torch.equal(told["dialogue_ids"], batch["dialogue_ids"])


def test_verify_counts_the_tokens_of_maps(tmp_path):
    samples = [parts_of(sizes, seed) for seed, sizes in enumerate(MIXED)]
    members = [member for seed, parts in enumerate(samples) for member in toys.members_of(f"k{seed}", parts)]
    shards = str(write_tar(tmp_path / "a.tar", members))
    wanted = [len(reader().read(parts, decode_metadata(parts), "").ids) for parts in samples]
    found = verify(shards, mode="full", num_workers=1, dialogue=reader().read).dialogues
    assert (found.num, found.tokens[0], found.tokens[2]) == (len(MIXED), min(wanted), max(wanted))
    in_rows = verify(shards, mode="full", num_workers=1, dialogue=reader(tile_layout="rows").read).dialogues
    assert in_rows.tokens[2] != found.tokens[2]
