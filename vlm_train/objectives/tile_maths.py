"""What a tile of cosines says of its rows and columns, and the gradient of its logits, in torch.

`tile_kernels.py` has the same functions with the same names as one kernel each; these are what it is held against, and
what runs where it cannot. Cosines are [R, C], those of R images and C texts with ids [R, I] and [C, I]; a logit is
scale * cosine, and with `sigmoid` scale * cosine + bias. The functions may overwrite the cosines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.objectives.pairing import partner_mask

TOP, EXP_SUM, PARTNERS, NUM_PARTNERS, NUM_TOP, PARTNERS_AT_TOP = range(6)
"""Columns of the sums of a row: the largest logit; the sum of exp(logit - largest); the sum of its partners' logits and
their number; how many logits equal the largest, and how many of these are partners'."""


def softmax_sums(cosines_RC: Tensor, scale: Tensor, image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the rows [R, 6] and of the columns [C, 6]."""
    logits, mask = scale * cosines_RC, partner_mask(image_ids, text_ids)
    return _sums_of(logits, mask), _sums_of(logits.T, mask.T)


def softmax_grad(
    cosines_RC: Tensor, scale: Tensor, image_ids: Tensor, text_ids: Tensor, rows_R4: Tensor, columns_C4: Tensor
) -> Tensor:
    """Gradient of the terms of rows and columns for the logits. `rows_R4`, `columns_C4`: `summary`, and the gradient
    of each one's term."""
    logits, mask = scale * cosines_RC, partner_mask(image_ids, text_ids)
    return _softmax_grad(logits, mask, rows_R4) + _softmax_grad(logits.T, mask.T, columns_C4).T


def sigmoid_sums(
    cosines_RC: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums of the rows [R, 6], and the sum of softplus(logit), scalar."""
    logits = scale * cosines_RC + bias
    return _sums_of(logits, partner_mask(image_ids, text_ids)), F.softplus(logits).sum()


def sigmoid_grad(
    cosines_RC: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the terms for the logits, and its sum, scalar. `grad`: that of the sum of the terms, scalar."""
    logits, mask = scale * cosines_RC + bias, partner_mask(image_ids, text_ids)
    logit_grad = grad * (logits.sigmoid() - mask.to(logits.dtype))
    return logit_grad, logit_grad.sum()


def merged(parts_KN6: Tensor) -> Tensor:
    """The sums over what K disjoint parts of a row were summed over, [N, 6]."""
    top = parts_KN6[..., TOP].amax(0)
    out = parts_KN6.sum(0)
    out[:, TOP] = top
    out[:, EXP_SUM] = (parts_KN6[..., EXP_SUM] * (parts_KN6[..., TOP] - top).exp()).sum(0)
    for name in (NUM_TOP, PARTNERS_AT_TOP):
        out[:, name] = torch.where(parts_KN6[..., TOP] == top, parts_KN6[..., name], 0).sum(0)
    return out


def no_sums(num_rows: int, like: Tensor) -> Tensor:
    """The sums over nothing, [num_rows, 6]."""
    sums = like.new_zeros(num_rows, 6)
    sums[:, TOP] = torch.finfo(like.dtype).min
    return sums


def summary(sums: Tensor) -> Tensor:
    """[n, 3]: the largest logit; log of the sum of exp(logit - largest); one over the number of partners, or 0.

    The first two stay apart: their sum would round away what distinguishes a probability near 1 from 1.
    """
    share = torch.where(sums[:, NUM_PARTNERS] > 0, 1 / sums[:, NUM_PARTNERS], 0)
    return torch.stack([sums[:, TOP], sums[:, EXP_SUM].log(), share], dim=1)


def _sums_of(logits_RC: Tensor, mask_RC: Tensor) -> Tensor:
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


def _softmax_grad(logits_RC: Tensor, mask_RC: Tensor, about_R4: Tensor) -> Tensor:
    """Gradient of the terms of the rows."""
    top, log_sum, share, weight = about_R4[:, None].unbind(2)
    return (((logits_RC - top) - log_sum).exp() - mask_RC * share) * weight
