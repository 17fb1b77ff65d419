"""What the `data` part of a config must be: sources, selections, groups, what a stream can have, augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeGuard

from vlm_train.checks.values import LARGEST, is_number, is_place, is_text, require

MAX_DENOMINATOR = 1 << 16
"""The smallest share of a source in a mixture is one in so many samples."""


def check_data(data: Mapping[str, Any], global_batch: int) -> None:
    """Refuses what cannot run, once the range of each key holds. Raises ConfigError."""
    _check_augment(data["augment"])
    _check_shards(data)
    _check_streaming(data)
    named = data["train"]["shards"]
    sources = [(f"data.train.shards.{name}.", source) for name, source in named.items()] if _is_mixture(named) else []
    for key, source in [("data.", data), *sources]:
        if source.get("groups") is not None:
            _check_groups(f"{key}groups", source["groups"], data["shuffle_window"], global_batch)


def check_weights(weights: Mapping[str, object]) -> None:
    """Refuses weights of the sources of a mixture that no stream could have. Raises ConfigError."""
    for name, weight in weights.items():
        require(is_number(weight) and 0 < weight <= LARGEST,  # type: ignore[operator]
                f"source `{name}` cannot have this weight", got=weight,
                allowed="a number above 0; weights are relative to each other",
                remedy=f"to train without `{name}`, take it out of the mixture")  # fmt: skip
    total = sum(Fraction(str(weight)) for weight in weights.values())
    for name, weight in weights.items():
        require(Fraction(str(weight)) * MAX_DENOMINATOR >= total,
                f"the weight of source `{name}` is too small beside the others", got=f"{weight} of {float(total)}",
                allowed=f"at least 1/{MAX_DENOMINATOR} of the sum of the weights",
                remedy=f"raise the weight of `{name}`, or take it out of the mixture")  # fmt: skip


def _check_augment(augment: Mapping[str, Any]) -> None:
    for key, low, high in (("scale", 0, 1), ("ratio", 1e-3, 1e3)):
        ends = augment[key]
        if ends is None:
            continue
        is_pair = len(ends) == 2 and all(map(is_number, ends))
        require(is_pair and low < ends[0] <= ends[1] <= high, f"data.augment.{key} is no range", got=ends,
                allowed=f"[low, high], {low} < low <= high <= {high}",
                remedy="data.augment.scale=[0.9,1.0] data.augment.ratio=[0.75,1.3333]")  # fmt: skip


def _check_shards(data: Mapping[str, Any]) -> None:
    train, val = data["train"]["shards"], data["val"]["shards"]
    require(not isinstance(val, Mapping), "data.val.shards is a mixture", got=val, allowed="one source",
            remedy="evaluate each source by itself")  # fmt: skip
    _check_source("data.val.shards", val)
    if not _is_mixture(train):
        _check_source("data.train.shards", train)
        require(not data["pure_batches"], "there is one source, so every batch is of one source",
                got="data.pure_batches=true", allowed="false, or a mixture in data.train.shards",
                remedy="data.pure_batches=false")  # fmt: skip
        return
    for name, source in train.items():
        _check_member(f"data.train.shards.{name}", name, source)
    check_weights({f"data.train.shards.{name}": source.get("weight", 1.0) for name, source in train.items()})
    require(len(set(map(str, train))) == len(train), "two sources of data.train.shards have the same name",
            got=", ".join(map(repr, train)), allowed="a name of its own for each", remedy="rename one")  # fmt: skip
    for key, example in (("selection", "DIR"), ("captions", "DIR"), ("groups", "{walk: DIR, size: N}")):
        require(data[key] is None, f"data.{key} is for a single source of data.train.shards",
                got=f"data.{key}={data[key]}", allowed="one for each source",
                remedy=f"data.train.shards.NAME.{key}={example}")  # fmt: skip
    require(len(train) < 2 or data["epoch_end"] == "wrap", "the sources of data.train.shards have no common epoch",
            got=f"data.epoch_end={data['epoch_end']}", allowed="wrap", remedy="data.epoch_end=wrap")  # fmt: skip


def _is_mixture(shards: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(shards, Mapping) and bool(shards)


def _check_source(key: str, shards: object) -> None:
    listed = shards if isinstance(shards, list) else [shards]
    require(bool(listed) and all(map(is_text, listed)), f"{key} names no shards", got=shards,
            allowed="a folder, a glob, a brace pattern, a URL, or a list of these, as texts",
            remedy=f"{key}='path/{{00000..00012}}.tar'")  # fmt: skip


def _check_member(key: str, name: object, source: object) -> None:
    is_named = isinstance(name, str | int) and not isinstance(name, bool) and bool(str(name).strip())
    require(is_named, f"{key}: a source needs a name", got=repr(name), allowed="a text", remedy="rename it")
    known = {"shards", "weight", "selection", "captions", "groups"}
    require(isinstance(source, Mapping) and "shards" in source and set(source) <= known,
            f"{key} is no source of a mixture", got=source,
            allowed="shards, and if wanted weight, selection, captions and groups",
            remedy=f"{key}={{shards: PATH, weight: 1.0}}")  # fmt: skip
    assert isinstance(source, Mapping)
    _check_source(f"{key}.shards", source["shards"])
    for part, what in (("selection", "a selection"), ("captions", "a table of captions")):
        where = source.get(part)
        require(where is None or is_place(where), f"{key}.{part} is no path on a local disk", got=where,
                allowed=f"the folder of {what}", remedy=f"{key}.{part}=DIR")  # fmt: skip


def _check_groups(key: str, groups: object, shuffle_window: int, global_batch: int) -> None:
    is_whole = isinstance(groups, Mapping) and set(groups) == {"walk", "size"}
    require(is_whole, f"{key} does not say what its groups are", got=groups, allowed="walk and size, or null",
            remedy=f"{key}={{walk: DIR, size: 2}}")  # fmt: skip
    assert isinstance(groups, Mapping)
    walk, size = groups["walk"], groups["size"]
    require(is_place(walk), f"{key}.walk is no path on a local disk", got=walk, allowed="the folder of a walk",
            remedy="vlm-train data walk SHARDS --run RUN --out DIR")  # fmt: skip
    require(isinstance(size, int) and is_number(size) and size > 1 and global_batch % size == 0,
            f"a global batch is no whole number of groups of {key}.size",
            got=f"size {size}, trainer.global_batch={global_batch}",
            allowed="a whole number above 1 that divides trainer.global_batch",
            remedy="size: 2, 4 or 8, and trainer.global_batch a multiple of it")  # fmt: skip
    require(shuffle_window > 0, "groups are shuffled, and data.shuffle_window=0 keeps the order of the files",
            got=f"data.shuffle_window=0 {key}={groups}", allowed="a window above 0, or no groups",
            remedy="data.shuffle_window=64")  # fmt: skip


def _check_streaming(data: Mapping[str, Any]) -> None:
    if not data["streaming"]:
        return
    require(not isinstance(data["train"]["shards"], Mapping), "a mixture cannot be streamed",
            got="data.streaming=true, several sources in data.train.shards", allowed="one source",
            remedy="data.streaming=false")  # fmt: skip
    for key, what in (("selection", "a selection needs"), ("captions", "captions need"), ("groups", "groups need")):
        require(data[key] is None, f"{what} a manifest, which a stream has not",
                got=f"data.streaming=true data.{key}={data[key]}", allowed=f"data.{key}=null",
                remedy="data.streaming=false")  # fmt: skip
    require(data["epoch_end"] == "wrap", "a stream cannot tell where its epoch ends before it does",
            got=f"data.streaming=true data.epoch_end={data['epoch_end']}", allowed="data.epoch_end=wrap",
            remedy="data.epoch_end=wrap")  # fmt: skip
