"""Which patches of an image a vision tower reads while it trains (FLIP, Li et al. 2023, arXiv 2212.00794).

The rest leave the sequence, so the tower computes that much less. Which ones is a function of a number that comes with
the sample (`types.BatchRows.draws`), not of a generator's state: so a sample loses the same patches whichever rank,
micro-batch, device or restart it meets, and the second pass over a micro-batch sees what the first one saw.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea & Flood 2014) as int64, whose products and sums wrap around on every device
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_LAST_SHIFT = 31


def num_kept(num_patches: int, dropout: float) -> int:
    """How many of `num_patches` stay when the share `dropout` leaves: at least one."""
    return max(1, round(num_patches * (1 - dropout)))


def kept_patches(draws_B: Tensor, *, num_patches: int, num_kept: int) -> Tensor:
    """The numbers of the patches that stay: [B] int64 -> [B, num_kept] int64, ascending; each patch equally likely.

    Patches are ranked by a hash of (draw, patch). For one draw it is one-to-one, so there are no ties to break.
    """
    counters_P = torch.arange(1, num_patches + 1, dtype=torch.int64, device=draws_B.device)
    rank_BP = _hash(draws_B[:, None] + counters_P * _GAMMA)
    return rank_BP.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def _hash(x: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, _LAST_SHIFT)


def _shifted(x: Tensor, num_bits: int) -> Tensor:
    """x >> num_bits of the unsigned number that the same bits are."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)
