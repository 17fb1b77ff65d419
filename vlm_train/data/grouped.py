"""An order of samples in groups that are hard negatives of each other: pieces of a walk, shuffled.

The kept samples of a walk (`walk`) are a ring. An epoch cuts it open at a place that its number decides, and from there
on into pieces of `size`; the pieces, not the samples, are permuted as `order` permutes. So every sample comes once an
epoch, its companions are its neighbours on the walk, and another epoch cuts between other samples. A position is still
answered at once, from the mapped walk and a bit for each of its places.

Where N samples are no whole number of groups, less than a group is left at the end. Epochs that follow each other
without a seam would then move all later groups across the borders of batches; so each epoch begins with as many samples
as complete the last group of the epoch before it, and groups begin at multiples of `size` for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.cumulative import UNIT, Bits, Weights
from vlm_train.data.order import Order, derive, permute
from vlm_train.data.selection import Selection
from vlm_train.data.walk import Walk
from vlm_train.errors import DataError

_CHUNK = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What a source's groups are: pieces of `walk` of `size` samples."""

    walk: Walk
    size: int


class GroupedOrder(Order):
    """Position within an epoch -> manifest row, in groups.

    Args:
        groups: the walk, and how much of it is a group.
        selection: which rows count; those that do not leave the walk.
        shard_starts: [num_shards + 1] first row of each shard, and the end.
        seed: what makes this order differ from another.
        wraps: whether epochs follow each other without a seam; else each begins with a group.

    Raises:
        DataError: no sample is kept, or the selection repeats samples.
    """

    def __init__(
        self, *, groups: Groups, selection: Selection, shard_starts: NDArray[np.int64], seed: int, wraps: bool
    ) -> None:
        super().__init__(selection=selection, shard_starts=shard_starts)
        if isinstance(selection.content, Weights):
            raise DataError(
                "groups take each sample once an epoch, and the selection repeats samples",
                got="a selection with weights",
                allowed="a selection that keeps or drops",
                remedy="make it with --where alone, or set `groups` to null",
            )
        self.walk, self.size, self.seed, self.wraps = groups.walk, groups.size, seed, wraps
        self.groups = f"{self.walk.fingerprint} by {self.size}"
        mask, rows = selection.mask(), self.walk.rows
        kept = (mask[rows[place : place + _CHUNK]] for place in range(0, len(rows), _CHUNK))
        self._kept = Bits.pack(kept, len(rows))

    def rows(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order.rows`."""
        places = self._kept.find(self._ring(epoch, positions) * UNIT)
        return self.walk.rows[places].astype(np.int64)

    def _ring(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The kept sample of the walk [n], by its number, at each of `positions` [n]: a permutation of [0, N)."""
        key = derive(self.seed, np.array([epoch], np.uint64))
        cut, order = derive(int(key[0]), np.arange(2, dtype=np.uint64)).tolist()
        lead = min(-epoch * len(self) % self.size, len(self)) if self.wraps else 0
        num_groups = (len(self) - lead) // self.size
        groups, within = np.divmod(positions - lead, self.size)
        whole = (groups >= 0) & (groups < num_groups)
        sizes, keys = np.full((2, int(whole.sum())), [[num_groups], [order]], np.uint64)
        groups[whole] = permute(groups[whole].astype(np.uint64), sizes, keys).astype(np.int64)
        return (cut % len(self) + lead + groups * self.size + within) % len(self)
