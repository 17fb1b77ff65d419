"""The losses of `pairing.py` tile by tile, in O(b d) memory on each rank whatever the number of ranks.

Images stay where they are; texts travel round the ranks (`distributed/ring.py`). A rank forms the logits between its
images and the texts it holds, one tile at a time, adds what a tile says to running sums, and forgets the tile. What is
kept for the backward pass are the features and a few numbers a row; it forms each tile again, as FlashAttention does
(arXiv 2205.14135), and the gradient of a text travels with it and is complete when it comes home. Each tile is formed
by one rank alone, so what the ranks find for scale and bias adds up to the gradient, once.

For softmax a row needs the sum over all texts, and a text that over all images: the sums of texts travel with them.
Sums of exponentials are kept beside their running maximum, so nothing overflows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_train.distributed.ring import Homeward, travelling
from vlm_train.objectives.pairing import Pairing, full_precision, partner_mask

TILE = {"cpu": 1 << 18}
"""Logits that exist at once: what a core's own cache holds. Elsewhere `LARGE_TILE`."""

LARGE_TILE = 1 << 24

TOP, EXP_SUM, PARTNERS, NUM_PARTNERS, NUM_TOP, PARTNERS_AT_TOP = range(6)
"""Columns of the sums of a row: the largest logit; the sum of exp(logit - largest); the sum of its partners' logits and
their number; how many logits equal the largest, and how many of these are partners'."""


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
        rows, home = _no_sums(len(image_BD), scale), Homeward(pairing.text_counts)
        for text, ids in travelling([text_CD, pairing.text_ids], pairing.text_counts):
            columns = _no_sums(len(text), scale)
            for row, column in tiles(image_BD, text):
                logits = scale * (image_BD[row] @ text[column].T)
                mask = partner_mask(pairing.image_ids[row], ids[column])
                rows[row] = merged(rows[row], sums_of(logits, mask))
                columns[column] = merged(columns[column], sums_of(logits.T, mask.T))
            home.add(columns, merged)
        columns = home.arrived()
        who = pairing.image_ids, pairing.text_ids
        ctx.counts = pairing.text_counts
        ctx.save_for_backward(image_BD, text_CD, scale, _summary(rows), _summary(columns), *who)
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
        image_grad, home = torch.zeros_like(image_BD), Homeward(ctx.counts)
        for text, ids, about in travelling([text_CD, text_ids, columns], ctx.counts):
            text_grad = torch.zeros_like(text)
            for row, column in tiles(image_BD, text):
                logits = scale * (image_BD[row] @ text[column].T)
                mask = partner_mask(image_ids[row], ids[column])
                logit_grad = _softmax_grad(logits, mask, rows[row]) + _softmax_grad(logits.T, mask.T, about[column]).T
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
        rows, terms = _no_sums(len(image_BD), scale), scale.new_zeros(())
        for text, ids in travelling([text_CD, pairing.text_ids], pairing.text_counts):
            for row, column in tiles(image_BD, text):
                logits = scale * (image_BD[row] @ text[column].T) + bias
                mask = partner_mask(pairing.image_ids[row], ids[column])
                terms += F.softplus(logits).sum()
                rows[row] = merged(rows[row], sums_of(logits, mask))
        ctx.counts = pairing.text_counts
        ctx.save_for_backward(image_BD, text_CD, scale, bias, pairing.image_ids, pairing.text_ids)
        hits = _hits(rows).sum()
        ctx.mark_non_differentiable(hits)
        return terms - rows[:, PARTNERS].sum(), hits

    @staticmethod
    @_once_outside_autocast
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_CD, scale, bias, image_ids, text_ids = ctx.saved_tensors
        image_grad, home = torch.zeros_like(image_BD), Homeward(ctx.counts)
        bias_grad = torch.zeros_like(bias)
        for text, ids in travelling([text_CD, text_ids], ctx.counts):
            text_grad = torch.zeros_like(text)
            for row, column in tiles(image_BD, text):
                logits = scale * (image_BD[row] @ text[column].T) + bias
                mask = partner_mask(image_ids[row], ids[column])
                logit_grad = grad * (logits.sigmoid() - mask.to(logits.dtype))
                image_grad[row] += logit_grad @ text[column]
                text_grad[column] += logit_grad.T @ image_BD[row]
                bias_grad += logit_grad.sum()
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


def sums_of(logits_RC: Tensor, mask_RC: Tensor) -> Tensor:
    """What a tile says of its rows, [R, 6]."""
    top = logits_RC.amax(1, keepdim=True)
    at_top = logits_RC == top
    parts = [
        top.squeeze(1),
        (logits_RC - top).exp_().sum(1),
        torch.where(mask_RC, logits_RC, 0).sum(1),
        mask_RC.sum(1),
        at_top.sum(1),
        (at_top & mask_RC).sum(1),
    ]
    return torch.stack([part.to(logits_RC.dtype) for part in parts], dim=1)


def merged(first: Tensor, second: Tensor) -> Tensor:
    """The sums over the columns of both."""
    top = torch.maximum(first[:, TOP], second[:, TOP])
    out = first + second
    out[:, TOP] = top
    out[:, EXP_SUM] = sum(part[:, EXP_SUM] * (part[:, TOP] - top).exp() for part in (first, second))
    for name in (NUM_TOP, PARTNERS_AT_TOP):
        out[:, name] = sum(torch.where(part[:, TOP] == top, part[:, name], 0) for part in (first, second))
    return out


def _no_sums(num_rows: int, like: Tensor) -> Tensor:
    sums = like.new_zeros(num_rows, 6)
    sums[:, TOP] = torch.finfo(like.dtype).min
    return sums


def _summary(sums: Tensor) -> Tensor:
    """[n, 3]: the largest logit; log of the sum of exp(logit - largest); one over the number of partners, or 0.

    The first two stay apart: their sum would round away what distinguishes a probability near 1 from 1.
    """
    share = torch.where(sums[:, NUM_PARTNERS] > 0, 1 / sums[:, NUM_PARTNERS], 0)
    return torch.stack([sums[:, TOP], sums[:, EXP_SUM].log(), share], dim=1)


def _terms(sums: Tensor) -> Tensor:
    top, log_sum, share = _summary(sums).unbind(1)
    return (top - sums[:, PARTNERS] * share) + log_sum


def _hits(sums: Tensor) -> Tensor:
    return sums[:, PARTNERS_AT_TOP] / sums[:, NUM_TOP].clamp(min=1)


def _softmax_grad(logits_RC: Tensor, mask_RC: Tensor, about_R4: Tensor) -> Tensor:
    """Gradient of the terms of the rows; `about_R4`: `_summary` and the gradient of each row's term."""
    top, log_sum, share, weight = about_R4[:, None].unbind(2)
    return (((logits_RC - top) - log_sum).exp() - mask_RC * share) * weight
