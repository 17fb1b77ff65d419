"""The batch of one rank for one step: a pure function of the step, whatever machine or worker makes it.

Which samples a step has comes from `order.Stream`; a rank takes its share of those positions (`types.rank_share`). A
sample that cannot be used is replaced by a function of its row alone (the next kept rows of its shard, cyclically, then
the shards after it), so all topologies replace it alike, and the report of it travels in the batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.decode import SampleError
from vlm_train.data.order import EpochEnd, Stream, WindowedOrder
from vlm_train.data.selection import Selection
from vlm_train.errors import DataError, VlmError
from vlm_train.types import Batch, Sample, Source, rank_share

_MAX_REPLACEMENTS = 10_000


class ShardedSource(Source, Protocol):
    """What the loaders need of a source: reading, and how its rows lie in shards."""

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        """First row of each shard and the end, [num_shards + 1]."""

    def locate(self, row: int) -> tuple[str, str]:
        """(shard name, key) of a row; the key may be empty where the row cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """What defines a training stream beside its data.

    `global_batch`: G, samples of one step over all ranks. `num_steps`: length of the run. `shuffle_window`: shards
    mixed together, 0 for file order. `epoch_end`: see `order.Stream`.
    """

    seed: int
    global_batch: int
    num_steps: int
    shuffle_window: int = 64
    epoch_end: EpochEnd = "drop"


class Steps(Dataset):
    """Makes the batch of a step. An expected error is returned, not raised: so it keeps its parts across processes."""

    def __init__(self, source: ShardedSource, encoder: SampleEncoder) -> None:
        self.source, self.encoder = source, encoder

    def __getitem__(self, step: int) -> Batch | VlmError:
        try:
            return self.batch(step)
        except VlmError as error:
            return error

    def batch(self, step: int) -> Batch:
        """Makes the batch; the subclasses say of what."""
        raise NotImplementedError

    def read(self, row: int, *, seed: int, epoch: int | None) -> tuple[Sample | None, dict[str, Any] | None]:
        """(sample, None), or (None, the report of why it cannot be used)."""
        try:
            return self.encoder.encode(self.source.read(row), seed=seed, epoch=epoch), None
        except (DataError, OSError) as error:
            shard, key = self.source.locate(row)
            reason, detail = "unreadable", str(error)
            if isinstance(error, SampleError):
                reason, detail = error.reason, error.detail
            report = {"shard": shard, "key": key, "row": row, "reason": reason, "detail": detail[:200]}
            return None, {**report, "replaced_by": None}


class TrainSteps(Steps):
    """A rank's share of each global batch of the stream."""

    def __init__(
        self,
        source: ShardedSource,
        selection: Selection,
        spec: StreamSpec,
        encoder: SampleEncoder,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(source, encoder)
        counts = selection.counts(source.shard_starts)
        self.order = WindowedOrder(counts=counts, seed=spec.seed, shuffle_window=spec.shuffle_window)
        self.stream = Stream(order=self.order, global_batch=spec.global_batch, epoch_end=spec.epoch_end)
        self.selection, self.spec = selection, spec
        self.share = rank_share(spec.global_batch, rank, world_size)

    def batch(self, step: int) -> Batch:
        """Samples of positions [s G + start, s G + stop)."""
        positions = step * self.spec.global_batch + np.arange(*self.share, dtype=np.int64)
        epochs, indices, weights = self.stream.locate(positions)
        samples, errors = [], []
        for epoch, index, weight in zip(epochs.tolist(), indices.tolist(), weights.tolist(), strict=True):
            sample, error = self._sample(index, epoch) if weight else (self.encoder.blank(), None)
            samples.append(sample)
            errors += [error] if error else []
        batch = self.encoder.collate(samples, weights=weights.tolist())
        batch["step"], batch["errors"] = step, errors
        return batch

    def _sample(self, index: int, epoch: int) -> tuple[Sample, dict[str, Any] | None]:
        """The sample at a kept index, or the first usable one of its replacements and the report of the bad one."""
        first = None
        for candidate in itertools.islice(itertools.chain([index], self.order.replacements(index)), _MAX_REPLACEMENTS):
            row = int(self.selection.select(np.array([candidate]))[0])
            sample, error = self.read(row, seed=self.spec.seed, epoch=epoch)
            if sample is not None:
                return sample, {**first, "replaced_by": row} if first else None
            first = first or error
        raise DataError(
            "no sample near a bad one can be read",
            got=first,
            remedy="restore the shards, or leave them out of data.train.shards",
        )


class EvalSteps(Steps):
    """A rank's share of the source in file order; missing and bad rows become blanks of weight 0."""

    def __init__(
        self, source: ShardedSource, encoder: SampleEncoder, batch_size: int, rank: int, world_size: int
    ) -> None:
        super().__init__(source, encoder)
        self.start, self.stop = rank_share(len(source), rank, world_size)
        self.batch_size, self.largest_share = batch_size, -(-len(source) // world_size)

    def __len__(self) -> int:
        return -(-self.largest_share // self.batch_size)

    def batch(self, step: int) -> Batch:
        """Rows from the start of the share; the same size on every rank."""
        first = self.start + step * self.batch_size
        samples, weights, errors = [], [], []
        for row in range(first, min(first + self.batch_size, self.start + self.largest_share)):
            sample, error = self.read(row, seed=0, epoch=None) if row < self.stop else (None, None)
            samples.append(sample or self.encoder.blank())
            weights.append(1.0 if sample else 0.0)
            errors += [error] if error else []
        batch = self.encoder.collate(samples, weights=weights, evaluation=True)
        batch["step"], batch["errors"] = step, errors
        return batch
