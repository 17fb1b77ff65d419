"""Pairs and what a loss makes of them, for the tests of the tiled losses and of their fused kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.objectives.pairing import NOBODY, Pairing


def unit(num_rows: int, width: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(num_rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def make_pairing(num_pairs: int, num_hard: int, num_contents: int, seed: int) -> Pairing:
    """Pairs of which some share a content, and hard captions behind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_contents, (num_pairs, 2), generator=generator)
    num_texts = num_pairs + num_hard
    return Pairing(
        image_BD=unit(num_pairs, 8, generator).requires_grad_(),
        text_CD=unit(num_texts, 8, generator).requires_grad_(),
        image_ids=ids,
        text_ids=torch.cat([ids, torch.full((num_hard, 2), NOBODY)]),
        image_counts=[num_pairs],
        text_counts=[num_texts],
    )


def outcome(loss: Callable[..., tuple[Tensor, ...]], pairing: Pairing, *parameters: float) -> list[Tensor]:
    """Loss, hits, and every gradient."""
    pairing.image_BD.grad = pairing.text_CD.grad = None
    leaves = [pairing.image_BD.detach().new_tensor([value]).requires_grad_() for value in parameters]
    values = loss(pairing, *leaves)
    (values[0] * 0.37).backward()
    gradients = [pairing.image_BD.grad, pairing.text_CD.grad, *(leaf.grad for leaf in leaves)]
    return [value.detach() for value in (*values, *gradients)]
