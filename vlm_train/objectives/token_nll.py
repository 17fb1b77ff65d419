"""Negative log-likelihood of tokens whose logits are too many to exist at once.

A vocabulary's logits are V numbers for each token, 49,408 against a width of 512: of a batch they take more memory than
everything before them. Here they exist some rows at a time. Since the loss is one number, its gradient is known up to a
factor as soon as a row's logits are, so the forward pass forms that too and nothing is computed twice (as in Liger
Kernel, arXiv 2410.10989): three products with the vocabulary where a backward pass that forms the logits again needs
four. What waits for the backward pass are gradients as large as the inputs. Logits and sums are fp32 or better,
autocast off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_train.objectives.pairing import full_precision

MAX_LOGITS = 1 << 25
"""How many logits exist at once: 128 MiB of fp32, and once more while they are summed."""


def token_nll(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, Tensor]:
    """(sum over rows of -log softmax(hidden weight^T)[label], how many labels have the largest logit); scalars.

    Args:
        hidden_ND: rows that have a label, any number of them.
        weight_VD: one row for each entry of the vocabulary.
        labels_N: int64.
        max_logits: rows are taken so many at a time that no more logits exist at once; at least one.
    """
    dtype = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)
    with full_precision(hidden_ND):
        num_rows = max(1, max_logits // len(weight_VD))
        total, hits = _TokenNLL.apply(
            hidden_ND.to(dtype), weight_VD.to(dtype), labels_N, num_rows, torch.is_grad_enabled()
        )
    return total, hits


class _TokenNLL(torch.autograd.Function):
    """`token_nll` of tensors of one dtype, `num_rows` rows at a time; gradients are formed where `with_gradient`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, num_rows: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        total, hits = hidden_ND.new_zeros(()), labels_N.new_zeros(())
        needed = ctx.needs_input_grad if with_gradient else (False, False)
        d_hidden_ND = torch.empty_like(hidden_ND) if needed[0] else None
        d_weight_VD = torch.zeros_like(weight_VD) if needed[1] else None
        for start in range(0, len(hidden_ND), num_rows):
            rows = slice(start, start + num_rows)
            logits_NV, labels_N1 = hidden_ND[rows] @ weight_VD.T, labels_N[rows, None]
            log_sums_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
            total += (log_sums_N1 - logits_NV.gather(1, labels_N1)).sum()
            hits += (logits_NV.argmax(dim=1, keepdim=True) == labels_N1).sum()
            if not any(needed[:2]):
                continue
            d_logits_NV = logits_NV.sub_(log_sums_N1).exp_()
            d_logits_NV.scatter_add_(1, labels_N1, d_logits_NV.new_full(labels_N1.shape, -1.0))
            if d_hidden_ND is not None:
                torch.mm(d_logits_NV, weight_VD, out=d_hidden_ND[rows])
            if d_weight_VD is not None:
                d_weight_VD.addmm_(d_logits_NV.T, hidden_ND[rows])
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return *(None if gradient is None else gradient * factor for gradient in ctx.saved_tensors), None, None, None
