"""Negative log-likelihood of tokens whose logits are too many to exist at once.

A vocabulary's logits are V numbers for each token, 49,408 against a width of 512: of a batch they take more memory than
everything before them. Here they exist some rows at a time, and the backward pass forms them again (arXiv 1604.06174),
so what is kept does not grow with V. Logits and sums are fp32 or better, autocast off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm_train.objectives.pairing import full_precision

MAX_LOGITS = 1 << 25
"""How many logits exist at once: 128 MiB of fp32; the backward pass holds their softmax and gradient beside them."""


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
    hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    num_rows = max(1, max_logits // len(weight_VD))
    parts = [
        checkpoint(_nll, hidden, weight_VD, labels, use_reentrant=False, preserve_rng_state=False)
        for hidden, labels in zip(hidden_ND.split(num_rows), labels_N.split(num_rows), strict=True)
    ]
    totals, hits = zip(*parts, strict=True)
    return torch.stack(totals).sum(), torch.stack(hits).sum()


def _nll(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    with full_precision(hidden_ND):
        logits_NV = hidden_ND @ weight_VD.T
        total = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    return total, (logits_NV.detach().argmax(dim=1) == labels_N).sum()
