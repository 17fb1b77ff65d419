"""The batch of one rank for one step: a pure function of the step, whatever machine or worker makes it.

Which samples a step has comes from `mixture.Mixture`; a rank takes its share of those positions (`types.rank_share`). A
sample that cannot be used is replaced by a function of its row alone (the next kept rows of its shard, cyclically, then
the shards after it), so all topologies replace it alike, and the report of it travels in the batch.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vlm_train.data.collate import Draft, SampleEncoder
from vlm_train.data.decode import SampleError
from vlm_train.data.grouped import GroupedOrder, Groups
from vlm_train.data.mixture import Member, Mixture
from vlm_train.data.order import EpochEnd, Order, Stream, WindowedOrder, source_seed
from vlm_train.data.selection import Selection
from vlm_train.data.walk import Walk
from vlm_train.errors import ConfigError, DataError, VlmError
from vlm_train.types import Batch, RawSample, Source, rank_share

_STATE_VERSION = 2
_MAX_REPLACEMENTS = 10_000
_CHUNK = 512  # samples whose bytes are held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """What defines a training stream beside its data.

    `global_batch`: G, samples of one step over all ranks. `num_steps`: length of the run. `shuffle_window`: shards
    mixed together, 0 for file order. `epoch_end`: see `order.Stream`. `pure_batches`: all samples of a step are of one
    source of a mixture.
    """

    seed: int
    global_batch: int
    num_steps: int
    shuffle_window: int = 64
    epoch_end: EpochEnd = "drop"
    pure_batches: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredient:
    """One source of a run: its samples, which of them count, which stay together, and its part of the stream relative
    to the others. `captions`: fingerprint of the table that its captions come from."""

    source: Source
    selection: Selection
    groups: Groups | None = None
    name: str = ""
    weight: float = 1.0
    captions: str = ""


class Steps(Dataset):
    """Makes the batch of a step. An expected error is returned, not raised: so it keeps its parts across processes."""

    def __getitem__(self, step: int) -> Batch | VlmError:
        try:
            return self.batch(step)
        except VlmError as error:
            return error

    def batch(self, step: int) -> Batch:
        """Makes the batch; the subclasses say of what."""
        raise NotImplementedError


class StreamSteps(Steps):
    """The steps of a training stream, and where in it they stand.

    Args:
        spec: what the stream is.
        rank: this process.
        world_size: number of processes.

    Raises:
        ConfigError: more ranks than samples in a global batch.
    """

    samples_per_epoch: int | None = None  # None where nobody knows before it is over

    def __init__(self, spec: StreamSpec, rank: int, world_size: int) -> None:
        if spec.global_batch < world_size:
            raise ConfigError(
                "the global batch is smaller than the number of ranks",
                got=f"global batch {spec.global_batch}, {world_size} ranks",
                allowed=f"a global batch of at least {world_size}",
                remedy="raise `trainer.global_batch` or use fewer devices",
            )
        self.spec = spec
        self.share = rank_share(spec.global_batch, rank, world_size)

    def definition(self) -> dict[str, Any]:
        """What makes two streams the same; plain JSON, small, without a rank in it."""
        spec = self.spec
        order = {"window": spec.shuffle_window, "epoch_end": spec.epoch_end}
        return {"version": _STATE_VERSION, "seed": spec.seed, "global_batch": spec.global_batch, "order": order}

    def place(self, consumed: int, batch: Batch | None) -> dict[str, Any]:
        """Where the stream stands after `consumed` samples, `batch` being the last; plain JSON, equal on all ranks."""
        raise NotImplementedError

    def seek(self, place: dict[str, Any]) -> None:
        """Told the `place` of a state before it goes on from there."""


class TrainSteps(StreamSteps):
    """A rank's share of each global batch of a mixture; a single source is a mixture of one.

    Args:
        ingredients: the sources.
        spec: what the stream is.
        encoder: how records become batches.
        rank: this process.
        world_size: number of processes; any, also one that does not divide the global batch.

    Raises:
        ConfigError: more ranks than samples in a global batch, or weights and names that make no mixture.
        DataError: a selection or a walk is not of its source; a selection keeps nothing, less than `epoch_end: drop`
            needs, or repeats samples that are to come in groups.
    """

    def __init__(
        self, ingredients: Sequence[Ingredient], spec: StreamSpec, encoder: SampleEncoder, rank: int, world_size: int
    ) -> None:
        super().__init__(spec, rank, world_size)
        self.encoder = encoder
        self.sources = [ingredient.source for ingredient in ingredients]
        self.mixture = mixture_of(ingredients, spec)
        self.samples_per_epoch = self.mixture.epoch_length
        self._captions = [ingredient.captions for ingredient in ingredients]

    def definition(self) -> dict[str, Any]:
        """See `StreamSteps.definition`. Of several sources the hashes are hashed, so that the state stays small."""
        members = self.mixture.members
        orders = [member.stream.order for member in members]
        groups = [order.groups for order in orders]
        return {
            **super().definition(),
            "manifest": _joined([member.manifest for member in members]),
            "selection": _joined([order.selection.fingerprint for order in orders]),
            "groups": _joined(groups) if any(groups) else None,
            "captions": _joined(self._captions) if any(self._captions) else None,
            "mixture": self.mixture.fingerprint,
        }

    def place(self, consumed: int, batch: Batch | None) -> dict[str, Any]:
        """The epoch of each source."""
        return {"epoch": self.mixture.epochs(consumed)}

    def batch(self, step: int) -> Batch:
        """Samples of positions [s G + start, s G + stop)."""
        positions = step * self.spec.global_batch + np.arange(*self.share, dtype=np.int64)
        places = self.mixture.locate(positions)
        draft, errors = self.encoder.draft(len(positions)), []
        for start in range(0, len(positions), _CHUNK):
            chosen = np.arange(start, min(start + _CHUNK, len(positions)))
            chosen = chosen[places.weights[chosen] > 0]
            for place, sample in zip(chosen.tolist(), self._read(places.sources, places.rows, chosen), strict=True):
                source, row = int(places.sources[place]), int(places.rows[place])
                error = self._put(draft, place, sample, int(positions[place]))
                if error is not None:
                    errors.append(self._replace(draft, place, int(positions[place]), source, row, error))
        batch = draft.batch(weights=places.weights.tolist())
        batch["step"], batch["errors"] = step, errors
        return batch

    def _read(
        self, sources: NDArray[np.int64], rows: NDArray[np.int64], chosen: NDArray[np.int64]
    ) -> list[RawSample | DataError]:
        """The samples at places `chosen`, one call a source."""
        found: dict[int, RawSample | DataError] = {}
        for source in np.unique(sources[chosen]).tolist():
            mine = chosen[sources[chosen] == source]
            found |= zip(mine.tolist(), self.sources[source].read(rows[mine]), strict=True)
        return [found[place] for place in chosen.tolist()]

    def _put(self, draft: Draft, place: int, sample: RawSample | DataError, visit: int) -> DataError | None:
        """Fills a place of the batch; returns why it cannot be."""
        if isinstance(sample, DataError):
            return sample
        try:
            draft.put(place, sample, seed=self.spec.seed, visit=visit)
        except SampleError as error:
            return error
        return None

    def _replace(self, draft: Draft, place: int, visit: int, source: int, row: int, error: DataError) -> dict[str, Any]:
        """Fills a place with the first usable replacement of `row`; returns the report of the bad sample."""
        report, reasons = report_of(self.sources[source], row, error), Counter[str]()
        candidates = self.mixture.replacements(source, row)
        for candidate in itertools.islice(candidates, _MAX_REPLACEMENTS):
            (sample,) = self.sources[source].read(np.array([candidate]))
            problem = self._put(draft, place, sample, visit)
            if problem is None:
                return {**report, "replaced_by": candidate}
            reasons[reason := _reason(problem)] += 1
            if reason == "shard_unreadable":
                candidates.skip_shard()
        raise DataError(
            "no sample near a bad one can be used",
            got=f"{report}; tried in its place: {dict(reasons.most_common())}",
            allowed="samples that can be read, and fit the model and data.template",
            remedy="vlm-train data verify DIR --mode full names what is wrong with each; a dialogue_ reason may be the "
            "config's: model.context_length, model.max_images, data.template",
        )


class EvalSteps(Steps):
    """A rank's share of the source in file order; missing and bad rows become blanks of weight 0."""

    def __init__(self, source: Source, encoder: SampleEncoder, batch_size: int, rank: int, world_size: int) -> None:
        self.source, self.encoder = source, encoder
        self.start, self.stop = rank_share(len(source), rank, world_size)
        self.batch_size, self.largest_share = batch_size, -(-len(source) // world_size)

    def __len__(self) -> int:
        return -(-self.largest_share // self.batch_size)

    def batch(self, step: int) -> Batch:
        """Rows from the start of the share; the same size on every rank."""
        first = self.start + step * self.batch_size
        num_rows = min(self.batch_size, self.start + self.largest_share - first)
        rows = np.arange(first, max(first, min(first + num_rows, self.stop)))
        draft, weights, errors = self.encoder.draft(num_rows), [0.0] * num_rows, []
        for place, sample in enumerate(self.source.read(rows)):
            try:
                if isinstance(sample, DataError):
                    raise sample
                draft.put(place, sample)
                weights[place] = 1.0
            except DataError as error:
                errors.append(report_of(self.source, int(rows[place]), error))
        batch = draft.batch(weights=weights, evaluation=True)
        batch["step"], batch["errors"] = step, errors
        return batch


def report_of(source: Source, row: int, error: DataError) -> dict[str, Any]:
    """The line of data_errors.jsonl for a sample that cannot be used."""
    shard, key = source.locate(row)
    detail = (error.detail if isinstance(error, SampleError) else str(error))[:200]
    return {"shard": shard, "key": key, "row": row, "reason": _reason(error), "detail": detail, "replaced_by": None}


def _reason(error: DataError) -> str:
    return error.reason if isinstance(error, SampleError) else "unreadable"


def mixture_of(ingredients: Sequence[Ingredient], spec: StreamSpec) -> Mixture:
    """The order in which the samples of all sources come; their groups stay whole. Raises as TrainSteps does."""
    sizes = [ingredient.groups.size for ingredient in ingredients if ingredient.groups is not None]
    block = spec.global_batch if spec.pure_batches else math.lcm(*sizes)
    return Mixture([_member(each, spec) for each in ingredients], block=block if len(ingredients) > 1 else 1)


def _member(ingredient: Ingredient, spec: StreamSpec) -> Member:
    source = ingredient.source
    stream = Stream(order=_order(ingredient, spec), global_batch=spec.global_batch, epoch_end=spec.epoch_end)
    return Member(name=ingredient.name, weight=ingredient.weight, stream=stream, manifest=source.fingerprint)


def _order(ingredient: Ingredient, spec: StreamSpec) -> Order:
    source, selection, groups = ingredient.source, ingredient.selection, ingredient.groups
    _check_belongs("selection", selection, source)
    seed = source_seed(spec.seed, ingredient.name)
    if groups is None:
        return WindowedOrder(
            selection=selection, shard_starts=source.shard_starts, seed=seed, shuffle_window=spec.shuffle_window
        )
    _check_belongs("walk", groups.walk, source)
    wraps = spec.epoch_end == "wrap"
    return GroupedOrder(groups=groups, selection=selection, shard_starts=source.shard_starts, seed=seed, wraps=wraps)


def _check_belongs(what: str, part: Selection | Walk, source: Source) -> None:
    if part.num_rows != len(source) or part.manifest not in (None, source.fingerprint):
        raise DataError(
            f"the {what} was made for other data",
            got=f"{part.num_rows} rows of manifest {part.manifest}",
            allowed=f"{len(source)} rows of manifest {source.fingerprint}",
            remedy=f"make the {what} again on these shards",
        )


def _joined(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()
