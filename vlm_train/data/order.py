"""Which sample stands at which position of an endless stream: a pure function, no state, no buffer, no list.

Two levels, as a buffer shuffle has, but computed instead of collected: the shards are permuted, `shuffle_window`
neighbours in that permutation form a window, and inside a window the samples are permuted by a Feistel network with
cycle walking (a Feistel network is a bijection on k-bit numbers whatever its round function; a result that falls
outside [0, n) is encrypted again until it falls inside, which keeps it a bijection on [0, n): Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002). So any position is answered in O(1) time from O(number of shards)
memory, reads stay within the shards of a window, and neither workers nor ranks can change the order: they only ask for
parts of it.

All arithmetic is on uint64 and the mixer is written out here, because library generators change between versions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.selection import Selection
from vlm_train.errors import DataError

EpochEnd = Literal["drop", "wrap", "pad_zero_weight"]

_NUM_ROUNDS = 8
_PIECE = 4096  # rows looked at together in search of a replacement
_MIN_BITS = 6  # narrower halves mix badly: with 3 bits and 8 rounds places are visibly uneven
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of uint64 that scatters well."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive(key: int, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One independent 64-bit key for each word, from a parent key."""
    return mix(mix(np.full(1, key & _MASK, np.uint64)) + (words + np.uint64(1)) * np.uint64(_GOLDEN))


def source_seed(seed: int, name: str) -> int:
    """The seed of a source in a run of `seed`: of its name, so that no other source can change its order.

    A source without a name (the only one of its run) has the seed of the run.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") if name else seed


def permute(values: NDArray[np.uint64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Element-wise permutation: `values[i]` of [0, sizes[i]) goes to a place in [0, sizes[i]) that `keys[i]` decides.

    For a fixed (size, key) it is a bijection. Sizes up to 2^53.
    """
    result = _encrypt(values, sizes, keys)
    while (outside := result >= sizes).any():  # about once: above 64 the domain is less than twice the size
        result[outside] = _encrypt(result[outside], sizes[outside], keys[outside])
    return result


def _encrypt(values: NDArray[np.uint64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass of the Feistel network over the smallest power of two, at least 64, that holds `sizes`."""
    one = np.uint64(1)
    bits = np.maximum(np.frexp((sizes - one).astype(np.float64))[1], _MIN_BITS).astype(np.uint64)  # bit length
    low = bits >> one
    low_mask, high_mask = (one << low) - one, (one << (bits - low)) - one
    left, right = values >> low, values & low_mask
    for number in range(_NUM_ROUNDS):
        key = keys + np.uint64(number * _GOLDEN & _MASK)
        if number % 2:
            right = right ^ (mix(left + key) & low_mask)
        else:
            left = left ^ (mix(right + key) & high_mask)
    return (left << low) | right


@dataclass(frozen=True, slots=True)
class _Layout:
    """One epoch, the shards in stream order: the first slot of each, the position where it starts, the position where
    each window starts. Slots are numbered in file order."""

    slot_starts: NDArray[np.int64]
    shard_starts: NDArray[np.int64]
    window_starts: NDArray[np.int64]
    window_keys: NDArray[np.uint64]


class Order:
    """Position within an epoch -> manifest row: a permutation of the slots of a selection.

    `groups` tells how samples are kept together, "" where each goes its own way.

    Args:
        selection: which rows count, and how often.
        shard_starts: [num_shards + 1] first row of each shard, and the end.

    Raises:
        DataError: no sample is kept.
    """

    groups = ""

    def __init__(self, *, selection: Selection, shard_starts: NDArray[np.int64]) -> None:
        self.selection, self.shard_starts = selection, shard_starts
        if not len(self):
            raise DataError("no sample is left to train on", got="0 kept samples", remedy="loosen `data.selection`")

    def __len__(self) -> int:
        return len(self.selection)

    def rows(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Manifest row [n] at each of `positions` [n], all within [0, len(self)) of one epoch."""
        raise NotImplementedError

    def replacements(self, row: int) -> Replacements:
        """The rows to try, in order, when the sample at `row` is bad."""
        return Replacements(self.selection, self.shard_starts, row)


class WindowedOrder(Order):
    """Position within an epoch -> manifest row, shuffled within windows of shards.

    Args:
        selection: which rows count, and how often.
        shard_starts: [num_shards + 1] first row of each shard, and the end.
        seed: what makes this order differ from another.
        shuffle_window: shards that are mixed together; 0 keeps the file order.

    Raises:
        DataError: no sample is kept.
    """

    def __init__(
        self, *, selection: Selection, shard_starts: NDArray[np.int64], seed: int, shuffle_window: int
    ) -> None:
        super().__init__(selection=selection, shard_starts=shard_starts)
        self.seed, self.shuffle_window = seed, shuffle_window
        self._layouts: dict[int, _Layout] = {}

    def rows(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order.rows`."""
        return self.selection.select(self.slots(epoch, positions), self.seed, epoch)

    def slots(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slot [n] at each of `positions` [n]: a permutation of [0, len(self))."""
        if not self.shuffle_window:
            return positions.copy()
        layout = self._layout(epoch)
        window = np.searchsorted(layout.window_starts, positions, side="right") - 1
        start = layout.window_starts[window]
        sizes = (layout.window_starts[window + 1] - start).astype(np.uint64)
        inside = permute((positions - start).astype(np.uint64), sizes, layout.window_keys[window])
        moved = start + inside.astype(np.int64)
        place = np.searchsorted(layout.shard_starts, moved, side="right") - 1  # the last of equals: no empty shard
        return layout.slot_starts[place] + moved - layout.shard_starts[place]

    def _layout(self, epoch: int) -> _Layout:
        if epoch not in self._layouts:
            key = int(derive(self.seed, np.array([epoch], np.uint64))[0])
            counts = self.selection.counts(self.shard_starts, self.seed, epoch)
            shards = np.argsort(derive(key, np.arange(len(counts), dtype=np.uint64)), kind="stable")
            shard_starts = np.concatenate([[0], np.cumsum(counts[shards])])
            edges = np.append(np.arange(0, len(counts), self.shuffle_window), len(counts))
            window_keys = derive(key ^ _GOLDEN, np.arange(len(edges), dtype=np.uint64))
            slot_starts = (np.cumsum(counts) - counts)[shards]
            if len(self._layouts) > 1:  # a batch spans two epochs, but for data smaller than it
                self._layouts.pop(min(self._layouts))
            self._layouts[epoch] = _Layout(slot_starts, shard_starts[:-1], shard_starts[edges], window_keys)
        return self._layouts[epoch]


class Replacements(Iterator[int]):
    """Kept rows to try in place of a bad one: round its shard from there on, then the shards after it, each row once.

    Depends on the row alone, so every topology replaces a bad sample by the same good one. A row is kept when its
    weight is not 0. `skip_shard` passes over the rest of the shard that the last row came from (at first, the shard of
    the bad row): for one that cannot be opened at all.
    """

    def __init__(self, selection: Selection, shard_starts: NDArray[np.int64], row: int) -> None:
        self._selection, self._starts = selection, shard_starts
        shard = int(np.searchsorted(shard_starts, row, side="right")) - 1
        self._shards = itertools.chain(range(shard + 1, len(shard_starts) - 1), range(shard))
        self._rows = self._kept([(row + 1, int(shard_starts[shard + 1])), (int(shard_starts[shard]), row)])

    def __next__(self) -> int:
        while (row := next(self._rows, None)) is None:
            shard = next(self._shards)
            self._rows = self._kept([(int(self._starts[shard]), int(self._starts[shard + 1]))])
        return row

    def skip_shard(self) -> None:
        """The next row will be of another shard."""
        self._rows = self._kept([])

    def _kept(self, ranges: list[tuple[int, int]]) -> Iterator[int]:
        for start, stop in ranges:
            for first in range(start, stop, _PIECE):
                yield from self._selection.kept(first, min(first + _PIECE, stop)).tolist()


class Stream:
    """The endless stream of one source: position -> (epoch, manifest row, weight).

    Args:
        order: the order inside an epoch.
        global_batch: G, samples of one step over all ranks.
        epoch_end: what happens where G does not divide the N samples of an epoch. `drop`: an epoch is floor(N / G) * G
            positions (other samples are left out each epoch); `wrap`: epochs follow each other without a seam;
            `pad_zero_weight`: an epoch is ceil(N / G) * G positions, those past N have weight 0.

    Raises:
        DataError: `drop` with fewer samples than one global batch.
    """

    def __init__(self, *, order: Order, global_batch: int, epoch_end: EpochEnd) -> None:
        num_kept = len(order)
        whole = num_kept // global_batch * global_batch
        padded = -(-num_kept // global_batch) * global_batch
        self.order, self.epoch_end = order, epoch_end
        self.epoch_length = {"drop": whole, "wrap": num_kept, "pad_zero_weight": padded}[epoch_end]
        if not self.epoch_length:
            raise DataError(
                "the data is smaller than one global batch, and data.epoch_end=drop would drop all of it",
                got=f"{num_kept} samples, global batch {global_batch}",
                allowed=f"a global batch of at most {num_kept}",
                remedy="lower trainer.global_batch, or set data.epoch_end=wrap",
            )

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """(epoch [n], row [n], weight [n]) of positions [n]; a padding place has weight 0, row 0."""
        epochs, inside = np.divmod(positions, self.epoch_length)
        weights = (inside < len(self.order)).astype(np.float32)
        rows = np.zeros_like(positions)
        for epoch in np.unique(epochs):
            mine = (epochs == epoch) & (weights > 0)
            rows[mine] = self.order.rows(int(epoch), inside[mine])
        return epochs, rows, weights
