"""Tiles: which grid, which tokens, which pixels, and that a model meets the same number of each."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import dialogue_toys
import numpy as np
import pytest
import several_images as toys
import torch
from data_fixtures import SPEC, encoded, pixels, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from vlm_train.data.chat import Turn
from vlm_train.data.collate import SampleEncoder
from vlm_train.data.decode import SampleError, decode_metadata, open_image
from vlm_train.data.dialogue import DialogueEncoder
from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.rendering import render, resized
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient, StreamSpec, TrainSteps
from vlm_train.data.tiles import as_seen, grid_of
from vlm_train.data.transforms import EvalTransform, TrainTransform, keyed_generator
from vlm_train.data.verify import verify
from vlm_train.errors import ConfigError
from vlm_train.imaging import recolour
from vlm_train.models.connectors.linear import MLPConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import IMAGE_ID, WHOLE, Batch, DialogueSpec, Grid, grids_of

S, MAX_TILES, CONTEXT = SPEC.size, 5, 2048
TILES = DialogueSpec(
    context_length=CONTEXT, num_image_tokens=toys.NUM_IMAGE_TOKENS, max_images=3, max_tiles=MAX_TILES, tile_size=S
)
UID = bytes(16)
sides = st.integers(1, 90)


@pytest.fixture(scope="module")
def newlines(tmp_path_factory):
    """A tokenizer that sees newlines; ours does not."""
    return dialogue_toys.byte_level(tmp_path_factory.mktemp("bytes"))


def reader(tokenizer=None, template="chatml", **changes) -> DialogueEncoder:
    return DialogueEncoder(template, tokenizer or toys.tokenizer(), replace(TILES, **changes), system="")


def encoder(read: DialogueEncoder, resize="squash", transform=None) -> SampleEncoder:
    transform = transform or EvalTransform(spec=replace(SPEC, resize=resize))
    return SampleEncoder(transform=transform, tokenizer=toys.tokenizer(), dialogues=read)


def parts_of(sizes, seed=0, kind="PNG", **options):
    """A sample with a picture of each size, and a question about them."""
    pictures = {f"{place}.png": encoded(pixels(10 * seed + place, *size), kind, **options)
                for place, size in enumerate(sizes)}  # fmt: skip
    facts = {"captions": ["a star"], "conversations": toys.said(len(sizes), f"Yes {seed}.")}
    return {**pictures, "json": json.dumps(facts).encode()}


def tiny_model(max_tiles=MAX_TILES, context=CONTEXT):
    torch.manual_seed(0)
    vision = VisionTransformer(image={"size": S}, patch_size=S, width=16, num_layers=1, num_heads=2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.5,
    }
    text = CausalLanguageModel(spec=toys.tokenizer().spec, architecture=sizes)
    model = GenerativeModel(
        vision=vision, connector=partial(MLPConnector, num_layers=1), text=text, context_length=context,
        max_images=3, max_tiles=max_tiles, drop_class_token=False,
    )  # fmt: skip
    return model.eval()


# The rule


def allowed(width, height, max_tiles, side):
    """Grids as the rule's words have them, the fewest tiles first."""
    grids = [Grid(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles + 1)]
    grids = [grid for grid in grids if grid.rows * grid.columns <= max_tiles]
    fits = [grid for grid in grids if grid == WHOLE or grid.rows * grid.columns * side**2 <= 2 * width * height]
    return sorted(fits, key=lambda grid: grid.rows * grid.columns)


def scale_of(grid, width, height, side):
    """How large a picture is that is fitted into a grid, in whole millionths of its own size."""
    return min(10**6, 10**6 * grid.columns * side // width, 10**6 * grid.rows * side // height)


pictures_and_limits = {
    "width": st.integers(1, 3000), "height": st.integers(1, 3000), "max_tiles": st.integers(1, 12),
    "side": st.sampled_from([16, 224, 336, 384]),
}  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(**pictures_and_limits)
def test_the_grid_is_what_the_rule_says(width, height, max_tiles, side):
    """Grid after grid, the fewest tiles first, until one is large enough."""
    grids = allowed(width, height, max_tiles, side)
    scales = [scale_of(grid, width, height, side) for grid in grids]
    found = grid_of(width, height, replace(TILES, max_tiles=max_tiles, tile_size=side))
    enough = 95 * max(scales)
    near = [grid for grid, scale in zip(grids, scales, strict=True) if abs(100 * scale - enough) <= 200]
    for number in range(1, max_tiles + 1):
        same = [(scale, grid) for grid, scale in zip(grids, scales, strict=True) if grid.rows * grid.columns == number]
        if max([(0, WHOLE), *same])[0] * 100 >= enough:
            assert found in [grid for scale, grid in same if scale == max(same)[0]] or found in near
            return


@settings(max_examples=300, deadline=None)
@given(**pictures_and_limits)
def test_llava_next_takes_no_fewer_tiles_for_no_larger_a_picture(width, height, max_tiles, side):
    """transformers' reading of its rule, which takes any gain, among the grids allowed."""
    sizes = [(grid.rows * side, grid.columns * side) for grid in allowed(width, height, max_tiles, side)]
    best = select_best_resolution((height, width), sizes)
    if best is None:  # so thin that nothing of it is left
        return
    theirs = Grid(best[0] // side, best[1] // side)
    found = grid_of(width, height, replace(TILES, max_tiles=max_tiles, tile_size=side))
    larger, smaller = (scale_of(grid, width, height, side) for grid in (theirs, found))
    assert smaller >= 0.95 * larger - 2
    # it counts whole pixels of the picture that is left, of which a few are rounding
    assert found.num_images <= theirs.num_images or larger < smaller


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((336, 336), (1, 1)), ((40, 30), (1, 1)), ((30, 400), (1, 1)), ((337, 337), (1, 1)), ((470, 470), (1, 1)),
        ((480, 480), (2, 2)), ((672, 672), (2, 2)), ((672, 336), (1, 2)), ((336, 672), (2, 1)), ((1000, 300), (1, 3)),
        ((900, 600), (2, 3)), ((600, 900), (3, 2)), ((4000, 500), (1, 6)), ((4000, 4000), (2, 2)),
        ((4000, 4040), (2, 2)), ((1450, 1000), (2, 3)), ((400, 300), (1, 2)),
    ],
)  # fmt: skip
def test_grids_of_six_tiles_of_336_pixels(size, grid):
    assert grid_of(*size, replace(TILES, max_tiles=6, tile_size=336)) == Grid(*grid)


@settings(deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), max_tiles=st.integers(1, 16))
def test_a_small_picture_is_not_enlarged_and_grids_turn_with_the_picture(width, height, max_tiles):
    spec = replace(TILES, max_tiles=max_tiles, tile_size=224)
    rows, columns, *_ = grid_of(width, height, spec)
    assert rows * columns <= max_tiles and grid_of(height, width, spec) == Grid(columns, rows)
    assert (rows, columns) == (1, 1) or rows * columns * 224**2 <= 2 * width * height
    if max(width, height) <= 224:
        assert (rows, columns) == (1, 1)


# Tokens


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(sides, sides), max_size=3), sees=st.booleans(), seed=st.integers(0, 3))
def test_tokens_of_a_picture_are_as_many_everywhere(newlines, sizes, sees, seed):
    """What is said beforehand, what the dialogue has, what the batch says and what the model makes."""
    read = reader(newlines if sees else None)
    parts = parts_of(sizes, seed)
    grids = tuple(grid_of(*size, TILES) for size in sizes)
    found = read.read(parts, decode_metadata(parts), "unused")
    whole = read.encode([*turns_of(sizes, seed)])  # every picture one image
    assert found.grids == grids and found.num_images == sum(grid.num_images for grid in grids)
    said = sum(len(read.picture(grid)) for grid in grids)
    assert len(found.ids) == len(whole.ids) + said - len(sizes) * toys.NUM_IMAGE_TOKENS
    num_marks = sum(grid.rows for grid in grids if grid != WHOLE)
    assert said == found.num_images * toys.NUM_IMAGE_TOKENS + (num_marks if sees else 0)
    assert (found.ids == IMAGE_ID).sum() == found.num_images * MODEL.tokens_per_image
    batch = toys.batch_of(encoder(reader()), [toys.raw_of(parts)])
    assert batch["num_images"].tolist() == [found.num_images]
    assert batch["images"].shape == (1, max(1, found.num_images), 3, S, S)
    tokens = MODEL._image_tokens(batch["images"], [found.num_images])
    assert tokens.shape[:2].numel() == max(1, found.num_images) * toys.NUM_IMAGE_TOKENS
    with torch.no_grad():
        assert MODEL(batch)["token_hidden"].shape[1] == -(-int(batch["dialogue_lengths"]) // 8) * 8
    if found.num_images:
        batch["num_images"] = batch["num_images"] - 1
        with pytest.raises(ConfigError, match="does not have the tokens"):
            MODEL(batch)


def turns_of(sizes, seed):
    return [Turn(**turn) for turn in toys.said(len(sizes), f"Yes {seed}.")]


MODEL = tiny_model()


def test_rows_are_marked_by_newlines(newlines):
    read = reader(newlines)
    (newline,) = [number for number in read.picture(Grid(1, 2)) if number != IMAGE_ID]
    image = [IMAGE_ID] * toys.NUM_IMAGE_TOKENS
    row = [newline, *image, *image, *image]
    assert newlines.inner.decode([newline]) == "\n"
    assert read.picture(Grid(2, 3)) == [*image, *row, *row] and read.picture(WHOLE) == image
    assert reader().picture(Grid(2, 3)) == image * 7  # ours joins spaces
    encoded = read.encode(turns_of([(1, 1)], 0), [Grid(2, 3)])
    start = int(np.flatnonzero(encoded.ids == IMAGE_ID)[0])
    assert encoded.ids[start : start + 16].tolist() == read.picture(Grid(2, 3))
    assert (encoded.labels[start - 1 : start + 15] < 0).all()  # nothing of a picture is to be told
    whole = read.encode(turns_of([(1, 1)], 0))
    text = encoded.ids[np.r_[:start, start + 16 : len(encoded.ids)]]
    assert text.tolist() == whole.ids[whole.ids != IMAGE_ID].tolist()  # the text around it is the same


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(20, 90), st.integers(20, 90)), length=st.integers(3, 120))
def test_a_cut_never_goes_through_a_picture(newlines, size, length):
    parts = parts_of([size])
    whole = reader(newlines).read(parts, decode_metadata(parts), "")
    last = int(np.flatnonzero(whole.ids == IMAGE_ID)[-1])
    try:
        cut = reader(newlines, context_length=length).read(parts, decode_metadata(parts), "")
    except SampleError as error:
        assert error.reason == ("dialogue_image_cut" if last >= length else "dialogue_no_label")
        return
    assert last < len(cut.ids) <= length and (cut.ids == whole.ids[: len(cut.ids)]).all()


# Pixels


def canvas_of(squares, grid):
    """Tiles put together again."""
    rows = [np.concatenate(list(squares[start : start + grid.columns]), axis=1)
            for start in range(0, len(squares), grid.columns)]  # fmt: skip
    return np.concatenate(rows)


@settings(max_examples=80, deadline=None)
@given(width=st.integers(20, 120), height=st.integers(20, 120), resize=st.sampled_from(["squash", "shortest", "pad"]))
def test_tiles_put_together_are_the_resized_picture_and_the_overview_is_the_plain_one(width, height, resize):
    spec = replace(SPEC, resize=resize)
    grid = grid_of(width, height, TILES)
    array = pixels(3, width, height)
    squares = as_seen(open_image(encoded(array, "PNG")), grid, spec)
    transform = EvalTransform(spec=spec)
    plain = render(array, transform.plan(width, height, keyed_generator(0, 0, UID, "image")))
    assert np.array_equal(squares[0], plain) and len(squares) == grid.num_images
    if grid == WHOLE:
        return
    canvas = canvas_of(squares[1:], grid)
    whole = resized(array, transform.on_grid(width, height, grid))
    assert np.array_equal(canvas, whole)
    size = (grid.columns * S, grid.rows * S)
    picture = padded(array, grid, spec) if resize == "pad" else array
    theirs = np.asarray(in_two_calls(Image.fromarray(picture), size))
    # the bar of tests/data/test_transforms.py is 1; of 1,500 drawn pictures nine differed by 2
    assert np.abs(canvas.astype(int) - theirs).max() <= 2
    swapped = squares[1:].copy()
    swapped[[0, -1]] = swapped[[-1, 0]]  # another order
    assert np.abs(canvas_of(swapped, grid).astype(int) - theirs).max() > 2


def in_two_calls(image, size):
    """Pillow's bicubic, columns first as it did before release 13."""
    between = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return between.resize(size, Image.Resampling.BICUBIC)


def padded(array, grid, spec):
    """The picture on a ground of the mean colour, in the aspect of the grid."""
    height, width, _ = array.shape
    full = max(width, -(-height * grid.columns // grid.rows)), max(height, -(-width * grid.rows // grid.columns))
    ground = Image.new("RGB", full, tuple(int(255 * mean) for mean in spec.mean))
    ground.paste(Image.fromarray(array), ((full[0] - width) // 2, (full[1] - height) // 2))
    return np.asarray(ground)


def test_tiles_of_a_jpeg_are_cut_from_few_decoded_pixels():
    """A JPEG comes at a part of its size, here a quarter: what differs is the decoder's filter."""
    array = pixels(5, 320, 320)
    data = encoded(array, quality=95)
    spec, grid = replace(SPEC, resize="squash"), Grid(2, 2)
    canvas = canvas_of(as_seen(open_image(data), grid, spec)[1:], grid).astype(int)
    whole = np.asarray(in_two_calls(Image.fromarray(open_image(data).decode()), (2 * S, 2 * S)))
    assert 0 < np.abs(canvas - whole).max() <= 6  # grey levels; measured 2
    turned = np.abs(canvas[::-1] - whole).max()
    assert turned > 30


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_laid_out_as_it_is_displayed(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = pixels(2, 96, 32)
    data = encoded(array, "PNG", exif=exif)
    image = open_image(data)
    assert (image.width, image.height) == ((96, 32) if orientation < 5 else (32, 96))
    grid = reader().grid(data)
    assert grid == (Grid(1, 3) if orientation < 5 else Grid(3, 1))
    shown = image.decode()
    assert shown.shape[:2] == (image.height, image.width)
    plain = {"0.png": encoded(shown, "PNG"), "json": parts_of([(1, 1)])["json"]}
    tagged = {**plain, "0.png": data}
    ours, theirs = (toys.batch_of(encoder(reader()), [toys.raw_of(parts)]) for parts in (tagged, plain))
    assert torch.equal(ours["images"], theirs["images"]) and torch.equal(ours["dialogue_ids"], theirs["dialogue_ids"])
    if orientation > 1:
        as_stored = toys.batch_of(encoder(reader()), [toys.raw_of({**plain, "0.png": encoded(array, "PNG")})])
        assert not torch.equal(ours["images"], as_stored["images"])


# Batches


MIXED = [[(40, 40)], [], [(90, 20), (10, 10), (33, 90)], [(16, 16)], [(20, 80), (80, 20)]]


def test_a_batch_has_as_many_places_as_it_needs():
    made = encoder(reader())
    raws = [toys.raw_of(parts_of(sizes, seed)) for seed, sizes in enumerate(MIXED)]
    batch = toys.batch_of(made, raws)
    grids = [[grid_of(*size, TILES) for size in sizes] for sizes in MIXED]
    counts = [sum(grid.num_images for grid in row) for row in grids]
    assert batch["num_images"].tolist() == counts and batch["images"].shape[1] == max(counts) < TILES.num_places
    assert batch["images"].flatten(2).any(dim=2).tolist() == [
        [place < count for place in range(max(counts))] for count in counts
    ]
    assert "grids" not in batch
    start = 0
    for (width, height), grid in zip(MIXED[2], grids[2], strict=True):  # several pictures, one behind the other
        place = MIXED[2].index((width, height))
        squares = as_seen(open_image(raws[2].parts[f"{place}.png"]), grid, replace(SPEC, resize="squash"))
        taken = batch["images"][2, start : start + grid.num_images].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(taken, squares)
        start += grid.num_images
    draft = made.draft(len(raws))
    for row, raw in enumerate(raws):
        draft.put(row, raw)
    told = draft.batch(weights=[1.0] * len(raws), evaluation=True)
    assert grids_of(told) == [tuple(row) for row in grids]
    texts = toys.batch_of(made, [raws[1]])
    assert texts["images"].shape == (1, 1, 3, S, S) and not texts["images"].any()


def test_a_bad_picture_leaves_nothing_behind():
    bad = parts_of([(40, 40), (40, 40)])
    bad["1.png"] = bad["1.png"][:-60]
    draft = encoder(reader()).draft(2)
    for row in (0, 1):
        with pytest.raises(SampleError, match="image_"):
            draft.put(row, toys.raw_of(bad))
    draft.put(0, toys.raw_of(parts_of([(16, 16)])))
    batch = draft.batch(weights=[1.0, 0.0])
    assert batch["num_images"].tolist() == [1, 0] and batch["images"].shape[1] == 1
    assert batch["images"][0].any() and not batch["images"][1].any()


def hidden(batch: Batch):
    with torch.no_grad():
        return MODEL(batch)["token_hidden"]


def test_rows_together_and_alone_give_the_same():
    made = encoder(reader())
    raws = [toys.raw_of(parts_of(sizes, seed)) for seed, sizes in enumerate(MIXED)]
    batch = toys.batch_of(made, raws)
    together = hidden(batch)
    for row, raw in enumerate(raws):
        alone = toys.batch_of(made, [raw])
        length = int(alone["dialogue_lengths"])
        torch.testing.assert_close(hidden(alone)[0, :length], together[row, :length], atol=1e-5, rtol=1e-5)
    first, last = batch["num_images"].tolist()[2], batch["num_images"].tolist()[4]
    reordered, neighbours = Batch(**batch), Batch(**batch)
    reordered["images"] = batch["images"].clone()
    reordered["images"][2, :first] = batch["images"][2, :first].flip(0)
    neighbours["images"] = batch["images"].clone()
    neighbours["images"][4, :last] = batch["images"][2, :last]
    for twin, row in ((reordered, 2), (neighbours, 4)):
        moved = (hidden(twin) - together).abs().amax((1, 2))
        assert moved[row] > 1e-3 and (moved > 1e-5).sum() == 1


def test_one_tile_is_todays_road():
    """Byte for byte, whatever the size of a picture."""
    raws = [toys.raw_of(parts_of(sizes, seed)) for seed, sizes in enumerate(MIXED)]
    ours = toys.batch_of(encoder(reader(max_tiles=1)), raws)
    today = toys.batch_of(encoder(toys.dialogues(3, CONTEXT)), raws)
    assert ours.keys() == today.keys() and ours["images"].shape[1] == 3
    for name in ("images", "num_images", "dialogue_ids", "dialogue_labels", "uids"):
        assert torch.equal(ours[name], today[name])


# Training


def test_training_without_a_crop_sees_what_evaluation_sees():
    for resize in ("squash", "shortest", "pad"):
        spec = replace(SPEC, resize=resize)
        whole = TrainTransform(spec=spec, scale=None)
        raws = [toys.raw_of(parts_of(sizes, seed)) for seed, sizes in enumerate(MIXED)]
        trained, evaluated = (
            toys.batch_of(encoder(reader(), transform=transform), raws, seed=3, visit=5)
            for transform in (whole, EvalTransform(spec=spec))
        )
        assert torch.equal(trained["images"], evaluated["images"])
        crop = encoder(reader(max_tiles=1), transform=TrainTransform(spec=spec, scale=(0.5, 0.9)))
        cropped = toys.batch_of(crop, raws[:1], seed=3, visit=5)
        assert not torch.equal(cropped["images"][0, 0], evaluated["images"][0, 0])


def test_mirrored_tiles_are_those_of_the_mirrored_picture():
    mirror = TrainTransform(spec=replace(SPEC, resize="squash"), scale=None, flip=1.0)
    parts = parts_of([(96, 32)])
    mirrored = {**parts, "0.png": encoded(np.ascontiguousarray(pixels(0, 96, 32)[:, ::-1]), "PNG")}
    found = toys.batch_of(encoder(reader(), transform=mirror), [toys.raw_of(parts)], visit=0)
    wanted = toys.batch_of(encoder(reader()), [toys.raw_of(mirrored)])
    assert found["images"].shape[1] == 4
    assert (found["images"].int() - wanted["images"].int()).abs().max() <= 1  # measured 0
    assert (found["images"][:, [0, 3, 2, 1]].int() - wanted["images"].int()).abs().max() > 10


def test_colours_of_tiles_are_those_of_one_picture():
    """They are changed before the picture is cut, so contrast has one mean."""
    drawn = TrainTransform(spec=replace(SPEC, resize="squash"), scale=None, color_jitter=0.4)
    array = np.repeat(np.repeat(np.array([[80, 110, 160]], np.uint8), 32, 0), 32, 1)[..., None].repeat(3, 2)
    parts = {"0.png": encoded(array, "PNG"), "json": parts_of([(1, 1)])["json"]}
    images = toys.batch_of(encoder(reader(), transform=drawn), [toys.raw_of(parts)], seed=2, visit=1)["images"][0]
    overview, tiles = images[0].float(), images[1:].float()
    means = [float(tile.mean()) for tile in tiles]
    assert len(tiles) == 3 and abs(float(overview.mean()) - sum(means) / 3) < 2
    factors = torch.tensor([drawn.plan(96, 32, keyed_generator(2, 1, toys.raw_of(parts).uid, "image")).colours])
    picture = torch.from_numpy(array).permute(2, 0, 1)[None]
    wanted = [float(part.float().mean()) for part in recolour(picture, factors).chunk(3, dim=3)]
    assert np.allclose(means, wanted, atol=2)
    alone = [float(recolour(part, factors).float().mean()) for part in picture.chunk(3, dim=3)]  # a mean for each tile
    assert not np.allclose(means, alone, atol=2)


def test_what_contradicts_is_refused():
    with pytest.raises(ConfigError, match="takes parts of them"):
        encoder(reader(), transform=TrainTransform(spec=SPEC))
    assert encoder(reader(max_tiles=1), transform=TrainTransform(spec=SPEC)).num_places == 3
    with pytest.raises(ConfigError, match="does not hold its dialogues"):
        tiny_model(context=3 * (MAX_TILES + 1) * toys.NUM_IMAGE_TOKENS)
    assert tiny_model(context=3 * (MAX_TILES + 1) * toys.NUM_IMAGE_TOKENS + 1).dialogue.num_places == 18
    assert tiny_model(1).dialogue == DialogueSpec(
        context_length=CONTEXT, num_image_tokens=2, max_images=3, max_tiles=1, tile_size=S
    )


def test_flops_count_every_image():
    one, five = (MODEL.forward_flops(100, number) for number in (1.0, 5.0))
    assert five["text"] == one["text"]
    assert all(five[part] == 5 * one[part] for part in ("vision", "connector"))


def test_a_picture_of_a_model_without_tiles_is_never_measured():
    assert reader(max_tiles=1).grid(b"no image at all") == WHOLE
    with pytest.raises(SampleError, match="image_unknown"):
        reader().grid(b"no image at all")


def test_verify_counts_the_tokens_of_tiles(tmp_path):
    samples = [parts_of(sizes, seed) for seed, sizes in enumerate(MIXED)]
    members = [member for seed, parts in enumerate(samples) for member in toys.members_of(f"k{seed}", parts)]
    shards = str(write_tar(tmp_path / "a.tar", members))
    wanted = [len(reader().read(parts, decode_metadata(parts), "").ids) for parts in samples]
    found = verify(shards, mode="full", num_workers=1, dialogue=reader().read).dialogues
    assert found.num == len(MIXED) and (found.tokens[0], found.tokens[2]) == (min(wanted), max(wanted))
    without = verify(shards, mode="full", num_workers=1, dialogue=reader(max_tiles=1).read).dialogues
    assert without.tokens[2] < found.tokens[2]
    short = reader(context_length=max(wanted) - 1)  # the longest ends with an answer, which is cut
    assert verify(shards, mode="full", num_workers=1, dialogue=short.read).dialogues.cut_share == 1 / len(MIXED)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 2)])
def test_a_stream_of_tiles_is_that_of_one_process(tmp_path, world_size, workers):
    """Ranks have as many places as their own rows need; what there is, is the same."""
    samples = [parts_of(MIXED[seed % len(MIXED)], seed) for seed in range(12)]
    members = [member for seed, parts in enumerate(samples) for member in toys.members_of(f"k{seed:02}", parts)]
    source = ShardSource(shards=str(write_tar(tmp_path / "a.tar", members)))
    spec = StreamSpec(seed=5, global_batch=6, num_steps=4, epoch_end="wrap", shuffle_window=2)
    ingredients = [Ingredient(source=source, selection=Selection.all(len(source)))]

    def rows(world_size, workers):
        found = []
        steps = [TrainSteps(ingredients, spec, encoder(reader()), rank, world_size) for rank in range(world_size)]
        loaders = [TrainLoader(steps=each, num_workers=workers) for each in steps]
        for batches in zip(*loaders, strict=True):
            for batch in batches:
                for row, number in enumerate(batch["num_images"].tolist()):
                    length = int(batch["dialogue_lengths"][row])
                    ids = batch["dialogue_ids"][row, :length].tolist()
                    assert not batch["images"][row, number:].any()
                    found.append((batch["keys"][row], ids, batch["images"][row, :number].numpy().tobytes()))
        return found

    alone = rows(1, 0)
    assert rows(world_size, workers) == alone and len({len(images) for _, _, images in alone}) > 3
