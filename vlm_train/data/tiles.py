"""Large pictures as tiles: how many, which tokens a dialogue has for them, and their pixels.

A tower sees S x S pixels. A picture that has more is laid on a grid of rows x columns tiles of that size, each of them
one image to the model, in reading order behind an overview, the whole picture at S x S, as in LLaVA-NeXT and Idefics 3.

A grid is measured by the scale at which the picture fits into it, its aspect kept, at most 1: what LLaVA-NeXT (Liu et
al. 2024) maximises. Allowed are grids of at most `max_tiles` tiles that have at most twice as many pixels as the
picture, so tiles are not made of few pixels. Taken is the one with the fewest tiles among those of at least 95 % of the
greatest scale, of equals that of the greater scale: a picture that is nearly square gets no further row for a hundredth
of its height. InternVL's rule (Chen et al. 2024) compares aspects first, so it enlarges a small oblong picture many
times and gives two tiles to a large one of 1.45 : 1 where four are allowed; Idefics 3's enlarges every picture.

A picture of n tokens an image is a run of n tokens for the overview and, row by row, a newline, where the tokenizer has
tokens for it, and n tokens for each tile of the row. The newline stands in front of a row, not behind it, so a run ends
as it begins, with an image, and no tokenizer joins it to the text behind.

Or the tiles become one map of tokens (`models.image_layout`), LLaVA-NeXT's layout. A picture is then fitted into the
canvas of its grid with its aspect kept, in the middle, behind borders of the mean colour; which rows and columns of
tokens are padding alone, and no tokens of a dialogue, follows from its size (`as_map`). The overview is what `resize`
of the tower makes of a picture; LLaVA-NeXT's is squashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_train.data.decode import EncodedImage
from vlm_train.data.rendering import render, resized
from vlm_train.data.transforms import EvalTransform, Plan, keyed_generator
from vlm_train.imaging import recolour
from vlm_train.types import IMAGE_ID, WHOLE, DialogueSpec, Grid, ImageSpec

_MAX_ENLARGED = 2  # a grid has at most so many times the pixels of its picture
_THRIFT = 95  # percent of the greatest scale


@lru_cache(maxsize=4096)
def grid_of(width: int, height: int, spec: DialogueSpec) -> Grid:
    """The tiles of a picture of `width` x `height` pixels as displayed."""
    side, most = spec.tile_size, spec.max_tiles
    grids = [Grid(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    num_fitting = max(1, _MAX_ENLARGED * width * height // side**2) if most > 1 else 1
    scales = {  # times width * height, so in whole numbers
        grid: min(width * height, grid.columns * side * height, grid.rows * side * width)
        for grid in grids
        if grid.rows * grid.columns <= num_fitting
    }
    enough = _THRIFT * max(scales.values())
    good = [grid for grid, scale in scales.items() if 100 * scale >= enough]
    best = min(good, key=lambda grid: (grid.rows * grid.columns, -scales[grid]))
    return as_map(best, width, height, math.isqrt(spec.num_image_tokens)) if spec.tile_layout == "map" else best


def as_map(grid: Grid, width: int, height: int, side: int) -> Grid:
    """The tiles of a picture of `width` x `height` pixels, each of `side` x `side` tokens, as one map without what is
    padding alone.

    LLaVA-NeXT's rounding, as transformers has it (`unpad_image`): the picture covers so many whole rows or columns of
    the map, rounded down, and half of the others, rounded down, is cut away at either end. So what is left has some of
    the picture in each row and column, at either end up to half a row of the picture may be cut away, and of a picture
    thinner than a row nothing may be left. A picture of one image is no map; transformers never has one.
    """
    if grid == WHOLE:
        return grid
    rows, columns = grid.rows * side, grid.columns * side
    above = (rows - min(rows, height * columns // width)) // 2
    left = (columns - min(columns, width * rows // height)) // 2
    return Grid(grid.rows, grid.columns, rows - 2 * above, columns - 2 * left)


def picture_ids(grid: Grid, num_image_tokens: int, row_mark: Sequence[int]) -> list[int]:
    """The tokens of a picture in a dialogue, IMAGE_ID where one is read of an image or is a map's own newline. Their
    number is the number of its tokens everywhere. `row_mark`: ids of a newline."""
    if grid == WHOLE or grid.is_map:
        return [IMAGE_ID] * grid.num_tokens(num_image_tokens)
    image = [IMAGE_ID] * num_image_tokens
    return image + [*row_mark, *image * grid.columns] * grid.rows


def render_tiles(image: EncodedImage, grid: Grid, whole: EvalTransform, like: Plan, out: NDArray[np.uint8]) -> None:
    """The tiles of a picture, without its overview, into `out` uint8 [rows * columns, S, S, 3].

    The picture is resized once and then cut, so no tile differs from its neighbour where they meet.

    Args:
        image: the picture.
        grid: of more than one tile.
        whole: how a whole picture is laid out.
        like: the plan of the overview, of which the tiles have mirroring and colours.
        out: where to write.

    Raises:
        SampleError: as `EncodedImage.decode`.
    """
    plan = whole.on_grid(image.width, image.height, grid)
    min_width, min_height = plan.min_decoded
    canvas = _framed(resized(image.decode(min_width=min_width, min_height=min_height), plan), grid, plan)
    if like.flip:
        canvas = canvas[:, ::-1]
    if like.colours is not None:
        pixels = torch.from_numpy(np.ascontiguousarray(canvas)).permute(2, 0, 1)[None]
        canvas = recolour(pixels, torch.tensor([like.colours]))[0].permute(1, 2, 0).numpy()
    tiles = canvas.reshape(grid.rows, plan.size, grid.columns, plan.size, 3).swapaxes(1, 2)
    out[...] = tiles.reshape(out.shape)


def _framed(picture: NDArray[np.uint8], grid: Grid, plan: Plan) -> NDArray[np.uint8]:
    """A picture in the middle of the canvas of its grid."""
    height, width = grid.rows * plan.size, grid.columns * plan.size
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    if picture.shape[:2] == (height, width):
        return picture
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[...] = plan.border
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def as_seen(image: EncodedImage, grid: Grid, spec: ImageSpec) -> NDArray[np.uint8]:
    """A picture as a model that answers is shown it in evaluation: uint8 [N, S, S, 3], the overview first.

    Raises:
        SampleError: as `EncodedImage.decode`.
    """
    whole = EvalTransform(spec=spec)
    plan = whole.plan(image.width, image.height, keyed_generator(0, 0, bytes(16), "image"))
    min_width, min_height = plan.min_decoded
    squares = np.empty((grid.num_images, plan.size, plan.size, 3), np.uint8)
    render(image.decode(min_width=min_width, min_height=min_height), plan, squares[0])
    if grid != WHOLE:
        render_tiles(image, grid, whole, plan, squares[1:])
    return squares
