"""Exact shares: so many rows of highest value, ties decided by uid."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation.clusters import uid_words
from vlm_train.data.order import derive, mix


def num_of_share(share: float, num: int) -> int:
    """How many of `num` rows a share is, as written in decimals, halves up: 0.29 of 100 is 29, which in binary
    fractions it is not."""
    return int((Decimal(repr(float(share))) * num).to_integral_value(ROUND_HALF_UP))


def highest(values: NDArray[np.float64], uids: NDArray[np.uint8], num: int) -> NDArray[np.bool_]:
    """bool [N]: the `num` rows of highest value, of equal ones those of lower uid.

    Args:
        values: [N], without NaN; inf may be among them.
        uids: uint8 [N, 16].
        num: 0 to N.
    """
    if not 0 < num < len(values):
        return np.full(len(values), num > 0)
    limit = np.partition(values, len(values) - num)[len(values) - num]
    chosen = values > limit
    ties = np.flatnonzero(values == limit)
    chosen[ties[np.lexsort(uid_words(uids[ties]))[: num - int(chosen.sum())]]] = True
    return chosen


def drawn(uids: NDArray[np.uint8], seed: int) -> NDArray[np.uint64]:
    """uint64 [N]: a hash of (seed, uid), which draws rows whatever their order."""
    low, high = uid_words(uids)
    return mix(high + derive(seed, low))
