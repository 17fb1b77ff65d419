"""The data parts of a run from the `data` part of its config: the only place that knows both.

`data` is plain (dicts and lists), with the keys of `schema.DataConfig`, checked by `checks/data.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vlm_train.data.captions import MAX_SAMPLES, CaptionStream, every_sample
from vlm_train.data.collate import SampleEncoder
from vlm_train.data.files import StorageOptions
from vlm_train.data.grouped import Groups
from vlm_train.data.indexing import Progress, open_manifest
from vlm_train.data.manifest import Manifest
from vlm_train.data.selection import Selection
from vlm_train.data.sources.recaptioned import RecaptionedSource
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient, StreamSpec, StreamSteps, TrainSteps, mixture_of
from vlm_train.data.streaming import TapeSteps, tars
from vlm_train.data.tape import ShuffledTapes
from vlm_train.data.walk import Walk
from vlm_train.errors import ConfigError
from vlm_train.log import get_logger
from vlm_train.types import Batch

Data = Mapping[str, Any]
log = get_logger(__name__)

_MAX_CAPTIONED = 20_000  # samples whose captions tell what is likely to be said


def manifests(data: Data, split: str, progress: Progress | None = None) -> Iterator[Manifest]:
    """The manifest of each source of a split, made where it is not there; none where the split is streamed."""
    if split == "train" and data["streaming"]:
        tars(data["train"]["shards"], _options(data))  # a missing shard is an error before the run starts
        return
    for _, source in _named(data[split]["shards"]):
        yield open_manifest(source["shards"], progress, _options(data))


def eval_source(data: Data) -> ShardSource:
    """The validation split."""
    return ShardSource(shards=data["val"]["shards"], options=_options(data))


class TrainSplit:
    """The training split as evaluation reads it, whatever a selection says: its sources one after the other.

    Args:
        data: the `data` part of the config.
        loader_of: makes an evaluation loader over a `source`.
    """

    def __init__(self, data: Data, loader_of: Callable[..., Iterable[Batch]]) -> None:
        self._data, self._loader_of = data, loader_of

    def batches(self) -> Iterator[Batch]:
        """This rank's share of each source.

        Raises:
            ConfigError: the split is streamed, so nobody knows its shares.
        """
        if self._data["streaming"]:
            raise ConfigError(
                "an evaluator that learns from the training split cannot read a stream",
                got="data.streaming=true",
                allowed="data.streaming=false",
                remedy="leave out the probe evaluator",
            )
        for _, source in _named(self._data["train"]["shards"]):
            yield from self._loader_of(source=ShardSource(shards=source["shards"], options=_options(self._data)))

    def captions(self) -> Iterator[str]:
        """Captions of all sources, as a tokenizer is trained on."""
        return iter(train_captions(self._data, max_samples=_MAX_CAPTIONED))


def train_steps(data: Data, spec: StreamSpec, encoder: SampleEncoder, rank: int, world_size: int) -> StreamSteps:
    """The steps of one rank.

    Raises:
        DataError: shards or a selection that cannot be used.
    """
    if data["streaming"]:
        return TapeSteps(
            data["train"]["shards"],
            spec,
            buffer=data["shuffle_buffer"],
            encoder=encoder,
            rank=rank,
            world_size=world_size,
            options=_options(data),
        )
    return TrainSteps(_ingredients(data, spec), spec, encoder, rank, world_size)


def check_train(data: Data, spec: StreamSpec) -> None:
    """Raises what `train_steps` would raise of the shards and selections, before anything else of a run is there."""
    if data["streaming"]:
        return
    ingredients = _ingredients(data, spec)
    mixture_of(ingredients, spec)
    for source in (ingredient.source for ingredient in ingredients):
        if isinstance(source, RecaptionedSource):
            log.info("%s", source.tally())


def train_captions(data: Data, max_samples: int = MAX_SAMPLES, *, with_dialogues: bool = False) -> CaptionStream:
    """What a tokenizer is trained on: the captions of all sources, new ones where there are some, and if asked for what
    is said in dialogues, whatever a selection says; of a larger source those of `max_samples` evenly spaced samples."""
    if data["streaming"]:
        options = _options(data)
        tapes = ShuffledTapes(tars(data["train"]["shards"], options), seed=0, buffer=0, options=options)
        return CaptionStream(lambda: itertools.islice(tapes.epoch(0, []), max_samples), with_dialogues)
    sources = [_source(data, described) for _, described in _named_for_training(data)]
    samples = partial(every_sample, max_samples=max_samples)
    return CaptionStream(lambda: itertools.chain.from_iterable(map(samples, sources)), with_dialogues)


def _named(shards: Any, alone: Mapping[str, Any] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """(name, {shards, weight, selection, captions, groups}) of each source; a single one has no name, and what `alone`
    says."""
    absent = {"weight": 1.0, "selection": None, "captions": None, "groups": None}
    if isinstance(shards, Mapping):
        return [(str(name), {**absent, **source}) for name, source in shards.items()]
    return [("", {**absent, **(alone or {}), "shards": shards})]


def _named_for_training(data: Data) -> list[tuple[str, dict[str, Any]]]:
    """`_named` of the training split. Runs of before a key have it not."""
    alone = {key: data.get(key) for key in ("selection", "captions", "groups")}
    return _named(data["train"]["shards"], alone)


def _ingredients(data: Data, spec: StreamSpec) -> list[Ingredient]:
    return [_ingredient(data, name, described, spec) for name, described in _named_for_training(data)]


def _source(data: Data, described: Mapping[str, Any]) -> ShardSource | RecaptionedSource:
    shards = ShardSource(shards=described["shards"], options=_options(data))
    return RecaptionedSource(shards, described["captions"]) if described["captions"] else shards


def _ingredient(data: Data, name: str, described: Mapping[str, Any], spec: StreamSpec) -> Ingredient:
    source = _source(data, described)
    where, asked = described["selection"], described["groups"]
    selection = Selection.load(Path(where), source.fingerprint) if where else Selection.all(len(source))
    groups = Groups(walk=Walk.load(asked["walk"], source.fingerprint), size=asked["size"]) if asked else None
    captions = ""
    if isinstance(source, RecaptionedSource):
        selection, captions = source.narrowed(selection), source.captions_fingerprint
    source.expect(selection, len(source.shard_starts) - 1 if groups else spec.shuffle_window)
    return Ingredient(
        name=name,
        source=source,
        selection=selection,
        groups=groups,
        weight=described["weight"],
        captions=captions,
    )


def _options(data: Data) -> StorageOptions:
    return StorageOptions(cache_gb=data["cache_gb"], retry_seconds=data["retry_seconds"])
