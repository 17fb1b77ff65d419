"""The functions of `tile_maths.py` on a GPU, each as one Triton kernel: what torch does in a dozen passes over a tile
is one read of it, and for a gradient one write, in its place. fp32 only. `tiled.maths_for` chooses between the two.

The products before and after a tile stay torch's. A program takes one block of the tile and leaves the block's sums in
its own place; they are merged afterwards, so nothing is added atomically and the same tile gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_train.objectives import tile_maths
from vlm_train.objectives.pairing import NOBODY

BLOCK = (64, 128)
"""Rows and columns that a program takes."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""How kernels are compiled. A product and a sum must not be fused: the difference of a row's largest logit and itself
would be what its product was rounded by, and not 0."""

_NOBODY = tl.constexpr(NOBODY)


def softmax_sums(cosines_RC: Tensor, scale: Tensor, image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `tile_maths.softmax_sums`."""
    num_rows, num_columns = cosines_RC.shape
    down, across = _num_blocks(cosines_RC)
    rows = cosines_RC.new_empty(6, across, num_rows)
    columns = cosines_RC.new_empty(6, down, num_columns)
    _launch(_softmax_sums, cosines_RC, image_ids, text_ids, scale, rows, columns)
    return _merged(rows), _merged(columns)


def softmax_grad(
    cosines_RC: Tensor, scale: Tensor, image_ids: Tensor, text_ids: Tensor, rows_R4: Tensor, columns_C4: Tensor
) -> Tensor:
    """As `tile_maths.softmax_grad`, in place of the cosines."""
    _launch(_softmax_grad, cosines_RC, image_ids, text_ids, scale, rows_R4.contiguous(), columns_C4.contiguous())
    return cosines_RC


def sigmoid_sums(
    cosines_RC: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """As `tile_maths.sigmoid_sums`."""
    down, across = _num_blocks(cosines_RC)
    rows = cosines_RC.new_empty(6, across, len(cosines_RC))
    softplus = cosines_RC.new_empty(down * across)
    _launch(_sigmoid_sums, cosines_RC, image_ids, text_ids, scale, bias, rows, softplus)
    return _merged(rows), softplus.sum()


def sigmoid_grad(
    cosines_RC: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """As `tile_maths.sigmoid_grad`, in place of the cosines."""
    down, across = _num_blocks(cosines_RC)
    total = cosines_RC.new_empty(down * across)
    _launch(_sigmoid_grad, cosines_RC, image_ids, text_ids, scale, bias, grad, total)
    return cosines_RC, total.sum()


def check(device: torch.device) -> None:
    """Compares every kernel with torch on a small tile. Raises where one cannot be built or run, or is wrong."""
    numbers = torch.arange(80 * 144, device=device)
    cosines, ids = numbers.float().sin().view(80, 144), numbers[:144, None] % 50 + NOBODY
    who, scale, bias = (ids[:80], ids.flip(0)), cosines.new_full((1,), 20.0), cosines.new_full((1,), -5.0)
    sums = tile_maths.softmax_sums(cosines, scale, *who)
    about = [torch.cat([tile_maths.summary(part), torch.full_like(part[:, :1], 0.5)], dim=1) for part in sums]
    for name, given in {
        "softmax_sums": (scale, *who),
        "softmax_grad": (scale, *who, *about),
        "sigmoid_sums": (scale, bias, *who),
        "sigmoid_grad": (scale, bias, *who, scale[0]),
    }.items():
        got, expected = (function(cosines.clone(), *given) for function in (globals()[name], getattr(tile_maths, name)))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # measured 1e-6


def _num_blocks(cosines_RC: Tensor) -> tuple[int, int]:
    num_rows, num_columns = cosines_RC.shape
    return triton.cdiv(num_rows, BLOCK[0]), triton.cdiv(num_columns, BLOCK[1])


def _launch(kernel: Any, cosines_RC: Tensor, image_ids: Tensor, text_ids: Tensor, *rest: Tensor) -> None:
    """One program for each block; Triton launches on the current device, which need not be the tile's."""
    down, across = _num_blocks(cosines_RC)
    num_rows, num_columns = cosines_RC.shape
    ids = image_ids.contiguous(), text_ids.contiguous()
    shape = num_rows, num_columns, (ids[0].shape[1], *BLOCK)
    with torch.cuda.device_of(cosines_RC):
        kernel[(down * across,)](cosines_RC, *ids, *rest, *shape, **OPTIONS)


def _merged(parts_6KN: Tensor) -> Tensor:
    return tile_maths.merged(parts_6KN.permute(1, 2, 0))


# Below, SIZES are the ids of an image or a text, and the rows and columns of a block.


@triton.jit
def _softmax_sums(cosines, image_ids, text_ids, scale, rows, columns, num_rows, num_columns, SIZES: tl.constexpr):
    row, column, place, within = _block(num_rows, num_columns, SIZES)
    mask = _partners(image_ids, text_ids, row, column, num_rows, num_columns, SIZES)
    logits = tl.load(scale) * tl.load(cosines + place, within, 0.0)
    _store_rows(rows, logits, mask, row, column, num_rows, num_columns, SIZES)
    block, num_blocks = tl.program_id(0) // tl.cdiv(num_columns, SIZES[2]), tl.cdiv(num_rows, SIZES[1])
    inside = tl.where(row[:, None] < num_rows, logits, float("-inf"))
    _store_sums(columns, inside, mask, 0, block, num_blocks, column, num_columns)


@triton.jit
def _softmax_grad(
    cosines, image_ids, text_ids, scale, about_rows, about_columns, num_rows, num_columns, SIZES: tl.constexpr
):
    row, column, place, within = _block(num_rows, num_columns, SIZES)
    mask = _partners(image_ids, text_ids, row, column, num_rows, num_columns, SIZES)
    logits = tl.load(scale) * tl.load(cosines + place, within, 0.0)
    partners = mask.to(tl.float32)
    top, log_sum, share, weight = _about(about_rows, row, num_rows)
    grad = (tl.exp((logits - top[:, None]) - log_sum[:, None]) - partners * share[:, None]) * weight[:, None]
    top, log_sum, share, weight = _about(about_columns, column, num_columns)
    grad += (tl.exp((logits - top[None, :]) - log_sum[None, :]) - partners * share[None, :]) * weight[None, :]
    tl.store(cosines + place, grad, within)


@triton.jit
def _sigmoid_sums(
    cosines, image_ids, text_ids, scale, bias, rows, softplus, num_rows, num_columns, SIZES: tl.constexpr
):
    row, column, place, within = _block(num_rows, num_columns, SIZES)
    mask = _partners(image_ids, text_ids, row, column, num_rows, num_columns, SIZES)
    logits = tl.load(scale) * tl.load(cosines + place, within, 0.0) + tl.load(bias)
    _store_rows(rows, logits, mask, row, column, num_rows, num_columns, SIZES)
    tl.store(softplus + tl.program_id(0), _total(_softplus(logits), within))


@triton.jit
def _sigmoid_grad(cosines, image_ids, text_ids, scale, bias, outer, total, num_rows, num_columns, SIZES: tl.constexpr):
    row, column, place, within = _block(num_rows, num_columns, SIZES)
    mask = _partners(image_ids, text_ids, row, column, num_rows, num_columns, SIZES)
    logits = tl.load(scale) * tl.load(cosines + place, within, 0.0) + tl.load(bias)
    grad = tl.load(outer) * (tl.sigmoid(logits) - mask.to(tl.float32))
    tl.store(cosines + place, grad, within)
    tl.store(total + tl.program_id(0), _total(grad, within))


@triton.jit
def _block(num_rows, num_columns, SIZES: tl.constexpr):
    """Rows and columns of this program's block, where its elements lie, and which of them are inside the tile."""
    num_across = tl.cdiv(num_columns, SIZES[2])
    row = tl.program_id(0) // num_across * SIZES[1] + tl.arange(0, SIZES[1])
    column = tl.program_id(0) % num_across * SIZES[2] + tl.arange(0, SIZES[2])
    within = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    return row, column, row[:, None] * num_columns + column[None, :], within


@triton.jit
def _partners(image_ids, text_ids, row, column, num_rows, num_columns, SIZES: tl.constexpr):
    """The partner mask; outside the tile there is nobody."""
    mask = tl.zeros((SIZES[1], SIZES[2]), tl.int1)
    for i in tl.static_range(SIZES[0]):
        image = tl.load(image_ids + row * SIZES[0] + i, row < num_rows, _NOBODY)
        text = tl.load(text_ids + column * SIZES[0] + i, column < num_columns, _NOBODY)
        mask |= (image[:, None] == text[None, :]) & (image[:, None] != _NOBODY)
    return mask


@triton.jit
def _store_rows(rows, logits, mask, row, column, num_rows, num_columns, SIZES: tl.constexpr):
    num_across = tl.cdiv(num_columns, SIZES[2])
    inside = tl.where(column[None, :] < num_columns, logits, float("-inf"))
    _store_sums(rows, inside, mask, 1, tl.program_id(0) % num_across, num_across, row, num_rows)


@triton.jit
def _store_sums(table, logits, mask, axis: tl.constexpr, block, num_blocks, index, num):
    """The six sums along `axis` into place `block` of [6, num_blocks, num]."""
    top = tl.max(logits, axis)
    top_beside = tl.expand_dims(top, axis)
    at_top = logits == top_beside
    place, size = table + block * num + index, num_blocks * num
    tl.store(place, top, index < num)
    tl.store(place + size, tl.sum(tl.exp(logits - top_beside), axis), index < num)
    tl.store(place + 2 * size, tl.sum(tl.where(mask, logits, 0.0), axis), index < num)
    tl.store(place + 3 * size, tl.sum(mask.to(tl.float32), axis), index < num)
    tl.store(place + 4 * size, tl.sum(at_top.to(tl.float32), axis), index < num)
    tl.store(place + 5 * size, tl.sum((at_top & mask).to(tl.float32), axis), index < num)


@triton.jit
def _about(about, index, num):
    """The four columns of [num, 4]."""
    place, within = about + index * 4, index < num
    top, log_sum = tl.load(place, within, 0.0), tl.load(place + 1, within, 0.0)
    return top, log_sum, tl.load(place + 2, within, 0.0), tl.load(place + 3, within, 0.0)


@triton.jit
def _total(x, within):
    return tl.sum(tl.sum(tl.where(within, x, 0.0), 1), 0)


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), the logarithm as 2 artanh(e / (2 + e)): 1 + e would round away e, which is
    all that a clear negative costs."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s  # 1/9 at most: the next term is below 2e-9 of the first
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series
