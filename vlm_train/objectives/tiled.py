"""The losses of `pairing.py` tile by tile, in O(b d) memory on each rank whatever the number of ranks.

Images stay where they are; texts travel round the ranks (`distributed/ring.py`). A rank forms the logits between its
images and the texts it holds, one tile at a time, adds what a tile says to running sums, and forgets the tile. What is
kept for the backward pass are the features and a few numbers a row; it forms each tile again, as FlashAttention does
(arXiv 2205.14135), and the gradient of a text travels with it and is complete when it comes home. Each tile is formed
by one rank alone, so what the ranks find for scale and bias adds up to the gradient, once.

For softmax a row needs the sum over all texts, and a text that over all images: the sums of texts travel with them.
Sums of exponentials are kept beside their running maximum, so nothing overflows.

The products are torch's; what is done between them is in `tile_maths.py`, and for GPUs in `tile_kernels.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_train.distributed.ring import Homeward, travelling
from vlm_train.log import get_logger
from vlm_train.objectives import tile_maths
from vlm_train.objectives.pairing import Pairing, full_precision
from vlm_train.objectives.tile_maths import NUM_TOP, PARTNERS, PARTNERS_AT_TOP, merged, no_sums, summary

LOG = get_logger(__name__)

TILE = {"cpu": 1 << 18}
"""Logits that exist at once: what a core's own cache holds. Elsewhere `LARGE_TILE`."""

LARGE_TILE = 1 << 24


def softmax_tiled(pairing: Pairing, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `pairing.softmax_gathered`. The backward pass is a collective too."""
    return _Softmax.apply(pairing.image_BD, pairing.text_CD, scale.to(pairing.image_BD.dtype), pairing)


def sigmoid_tiled(pairing: Pairing, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `pairing.sigmoid_gathered`. The backward pass is a collective too."""
    dtype = pairing.image_BD.dtype
    return _Sigmoid.apply(pairing.image_BD, pairing.text_CD, scale.to(dtype), bias.to(dtype), pairing)


def _once_outside_autocast(backward: Callable[..., Any]) -> Callable[[Any, Tensor], Any]:
    """A backward pass in Python runs under the autocast of its caller, which would round the logits."""

    @functools.wraps(backward)
    def wide(ctx: Any, *gradients: Tensor) -> Any:
        with full_precision(gradients[0]):
            return backward(ctx, *gradients)

    return once_differentiable(wide)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image_BD: Tensor, text_CD: Tensor, scale: Tensor, pairing: Pairing) -> tuple[Tensor, ...]:
        maths, rows, home = maths_for(image_BD), no_sums(len(image_BD), scale), Homeward(pairing.text_counts)
        for text, ids in travelling([text_CD, pairing.text_ids], pairing.text_counts):
            columns = no_sums(len(text), scale)
            for row, column in tiles(image_BD, text):
                cosines = image_BD[row] @ text[column].T
                of_rows, of_columns = maths.softmax_sums(cosines, scale, pairing.image_ids[row], ids[column])
                rows[row], columns[column] = _both(rows[row], of_rows), _both(columns[column], of_columns)
            home.add(columns, _both)
        columns = home.arrived()
        who = pairing.image_ids, pairing.text_ids
        ctx.counts = pairing.text_counts
        ctx.save_for_backward(image_BD, text_CD, scale, summary(rows), summary(columns), *who)
        asking = columns[: len(image_BD)]
        terms = _terms(rows).sum() + _terms(asking).sum()
        hits = _hits(rows).sum(), _hits(asking).sum()
        ctx.mark_non_differentiable(*hits)
        return terms / 2, *hits

    @staticmethod
    @_once_outside_autocast
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_CD, scale, rows, columns, image_ids, text_ids = ctx.saved_tensors
        # the terms of a text stand in the sum of its own rank, whose gradient need not be this rank's
        asks = torch.arange(len(columns), device=grad.device) < len(rows)
        columns = torch.cat([columns, (grad / 2 * asks)[:, None]], dim=1)
        rows = torch.cat([rows, (grad / 2).expand(len(rows), 1)], dim=1)
        maths, image_grad, home = maths_for(image_BD), torch.zeros_like(image_BD), Homeward(ctx.counts)
        for text, ids, about in travelling([text_CD, text_ids, columns], ctx.counts):
            text_grad = torch.zeros_like(text)
            for row, column in tiles(image_BD, text):
                cosines = image_BD[row] @ text[column].T
                who = image_ids[row], ids[column]
                logit_grad = maths.softmax_grad(cosines, scale, *who, rows[row], about[column])
                image_grad[row] += logit_grad @ text[column]
                text_grad[column] += logit_grad.T @ image_BD[row]
            home.add(text_grad, torch.add)
        scale_grad = (image_grad * image_BD).sum().expand_as(scale)  # = sum of logit_grad * cosine
        return image_grad * scale, home.arrived() * scale, scale_grad, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_BD: Tensor, text_CD: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing
    ) -> tuple[Tensor, Tensor]:
        maths, rows, terms = maths_for(image_BD), no_sums(len(image_BD), scale), scale.new_zeros(())
        for text, ids in travelling([text_CD, pairing.text_ids], pairing.text_counts):
            for row, column in tiles(image_BD, text):
                cosines = image_BD[row] @ text[column].T
                of_rows, softplus = maths.sigmoid_sums(cosines, scale, bias, pairing.image_ids[row], ids[column])
                rows[row], terms = _both(rows[row], of_rows), terms + softplus
        ctx.counts = pairing.text_counts
        ctx.save_for_backward(image_BD, text_CD, scale, bias, pairing.image_ids, pairing.text_ids)
        hits = _hits(rows).sum()
        ctx.mark_non_differentiable(hits)
        return terms - rows[:, PARTNERS].sum(), hits

    @staticmethod
    @_once_outside_autocast
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_CD, scale, bias, image_ids, text_ids = ctx.saved_tensors
        maths, image_grad, home = maths_for(image_BD), torch.zeros_like(image_BD), Homeward(ctx.counts)
        bias_grad = torch.zeros_like(bias)
        for text, ids in travelling([text_CD, text_ids], ctx.counts):
            text_grad = torch.zeros_like(text)
            for row, column in tiles(image_BD, text):
                cosines = image_BD[row] @ text[column].T
                logit_grad, total = maths.sigmoid_grad(cosines, scale, bias, image_ids[row], ids[column], grad)
                image_grad[row] += logit_grad @ text[column]
                text_grad[column] += logit_grad.T @ image_BD[row]
                bias_grad += total
            home.add(text_grad, torch.add)
        scale_grad = (image_grad * image_BD).sum().expand_as(scale)
        return image_grad * scale, home.arrived() * scale, scale_grad, bias_grad, None


def tiles(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts the product of [R, D] and [C, D] into tiles, near squares where both are long."""
    size = TILE.get(rows.device.type, LARGE_TILE)
    height = max(int(size**0.5), size // max(1, len(columns)))
    width = max(1, size // min(height, max(1, len(rows))))
    for row in range(0, len(rows), height):
        for column in range(0, len(columns), width):
            yield slice(row, row + height), slice(column, column + width)


def _both(first: Tensor, second: Tensor) -> Tensor:
    return merged(torch.stack([first, second]))


def _terms(sums: Tensor) -> Tensor:
    top, log_sum, share = summary(sums).unbind(1)
    return (top - sums[:, PARTNERS] * share) + log_sum


def _hits(sums: Tensor) -> Tensor:
    return sums[:, PARTNERS_AT_TOP] / sums[:, NUM_TOP].clamp(min=1)


def maths_for(x: Tensor) -> ModuleType:
    """What works on the tiles of `x`: `tile_kernels` in fp32 on a GPU that runs them, `tile_maths` elsewhere."""
    fused = _kernels(x.device) if x.device.type == "cuda" and x.dtype == torch.float32 else None
    return fused or tile_maths


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The fused kernels, once they have agreed with torch on this device; otherwise a warning says why not."""
    try:
        from vlm_train.objectives import tile_kernels

        tile_kernels.check(device)
    except Exception as error:  # no Triton, no C compiler, a card that it does not know: each fails in its own way
        LOG.warning("the tiled loss runs without its fused kernels on %s: %r", device, error)
        return None
    return tile_kernels
