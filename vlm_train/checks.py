"""What the values of a config must be, alone and together: refused before torch is imported.

Every refusal names the key and says what, got, allowed and remedy. `config` is a resolved config with the keys of
`schema.Config` and values of its types, as plain dicts and lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from vlm_train.errors import ConfigError

STRATEGIES = ("single", "ddp", "fsdp2")
EPOCH_ENDS = ("drop", "wrap", "pad_zero_weight")
MAX_DENOMINATOR = 1 << 16
"""The smallest share of a source in a mixture is one in so many samples."""

_MANY = 2**31 - 1  # far beyond any use, and a product of two still fits a position in the stream
_LARGEST = 1e300  # so that sums and products of a few numbers are finite too; NaN is not below it
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    "trainer.max_steps": (1, _MANY),
    "trainer.global_batch": (1, _MANY),
    "trainer.micro_batch": (1, _MANY),
    **dict.fromkeys(("trainer.devices", "trainer.num_nodes", "trainer.num_threads"), (1, 1024)),
    "data.hard_captions": (0, 1024),
    "data.num_workers": (0, 1024),
    **dict.fromkeys(("data.shuffle_window", "data.shuffle_buffer"), (0, _MANY)),
    **dict.fromkeys(("data.cache_gb", "data.retry_seconds"), (0, 10**9)),
    "data.max_error_rate": (0, 1),
    **dict.fromkeys(("data.augment.flip", "data.augment.color_jitter", "data.augment.grayscale"), (0, 1)),
    "spikes.threshold": (0, 10**6),
    "spikes.window": (2, 10_000),
    "spikes.rewind_steps": (0, _MANY),
    "spikes.max_rewinds": (0, _MANY),
    "checkpoint.every_steps": (1, _MANY),
    "checkpoint.keep": (1, _MANY),
    "evaluation.every_steps": (0, _MANY),
    "evaluation.batch_size": (1, _MANY),
}
_CHOICES = {
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "data.epoch_end": EPOCH_ENDS,
    "strategy.name": STRATEGIES,
    "precision.name": ("fp32", "bf16", "fp16", "fp64"),
    "attention.name": ("sdpa", "flash", "xformers", "eager"),
    "logger.name": ("none", "wandb"),
    "logger.mode": ("online", "offline"),
}
_NAMES = ("run.experiment", "run.id")
_PLACES = ("init", "run.dir", "run.resume", "data.selection", "data.classes")
_TEXTS = ("logger.project", "logger.entity")
_PARTS = ("model", "model.vision", "model.text", "model.tokenizer", "objective", "optim", "schedule")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_values(config: Mapping[str, Any]) -> None:
    """Refuses what cannot run. Raises ConfigError."""
    for key, (low, high) in _RANGES.items():
        value = _at(config, key)
        holds = value is None or (_is_number(value) and low <= value <= high)
        _require(holds, f"{key} is out of range", got=value, allowed=f"{low} to {high}",
                 remedy=f"vlm-train configs search {key}")  # fmt: skip
    for key, allowed in _CHOICES.items():
        word = key.removesuffix(".name")  # the group of the same name has a choice for each
        _require(_at(config, key) in allowed, f"{key} is not known", got=_at(config, key), allowed=", ".join(allowed),
                 remedy=f"{word}={allowed[0]}")  # fmt: skip
    _check_words(config)
    _check_parts(config)
    _check_patch_dropout(config["model"])
    _check_trainer(config)
    _check_augment(config["data"]["augment"])
    _check_shards(config["data"])
    _check_streaming(config["data"])
    _check_stages(config["stages"])
    for key, value in _leaves(config):
        _require(not isinstance(value, int | float) or abs(value) <= _LARGEST, f"{key} is not finite", got=value,
                 allowed="a finite number", remedy=f"vlm-train configs search {key}")  # fmt: skip


def check_weights(weights: Mapping[str, object]) -> None:
    """Refuses weights of the sources of a mixture that no stream could have. Raises ConfigError."""
    for name, weight in weights.items():
        _require(_is_number(weight) and 0 < weight <= _LARGEST,  # type: ignore[operator]
                 f"source `{name}` cannot have this weight", got=weight,
                 allowed="a number above 0; weights are relative to each other",
                 remedy=f"to train without `{name}`, take it out of the mixture")  # fmt: skip
    total = sum(Fraction(str(weight)) for weight in weights.values())
    for name, weight in weights.items():
        _require(Fraction(str(weight)) * MAX_DENOMINATOR >= total,
                 f"the weight of source `{name}` is too small beside the others", got=f"{weight} of {float(total)}",
                 allowed=f"at least 1/{MAX_DENOMINATOR} of the sum of the weights",
                 remedy=f"raise the weight of `{name}`, or take it out of the mixture")  # fmt: skip


def _require(holds: bool, what: str, *, got: object, allowed: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(what, got=said(got), allowed=allowed, remedy=remedy)


def said(value: object) -> str:
    """A value as a config spells it, of a length that can be read."""
    try:
        text = "null" if value is None else str(value) or "''"
    except ValueError:  # Python prints no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node[name]
    return node


def _leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping and no list, with its key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{where}[{number}]")
    else:
        yield where, node


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_name(value: object) -> bool:
    """Whether a text can name a file or a folder of its own: no way to another one, and no pointer of ours."""
    return isinstance(value, str) and bool(re.fullmatch(r"[^/\s.-][^/\s]{0,199}", value)) and value.isprintable()


def _is_place(value: object) -> bool:
    return _is_text(value) and "://" not in str(value)


def _check_words(config: Mapping[str, Any]) -> None:
    for key in _NAMES:
        value = _at(config, key)
        _require(value is None or (_is_name(value) and value != "latest"), f"{key} cannot name a folder",
                 got=repr(value), allowed="letters, digits and signs without / and spaces; not `latest`",
                 remedy=f"{key}=mine")  # fmt: skip
    for key in _PLACES:
        value = _at(config, key)
        _require(value is None or _is_place(value), f"{key} is no path on a local disk", got=repr(value),
                 allowed="a path", remedy=f"{key}=PATH, or leave it out")  # fmt: skip
    for key in _TEXTS:
        value = _at(config, key)
        _require(value is None or _is_text(value), f"{key} is empty", got=repr(value), allowed="a name",
                 remedy=f"{key}=NAME, or leave it out")  # fmt: skip


def _check_parts(config: Mapping[str, Any]) -> None:
    """Whether what is built from a class says which; `signatures.py` compares the keys with that class."""
    for key in (key for key in _PARTS if key != "model.vision" or "vision" in config["model"]):
        group, _, last = key.partition(".")
        node = config[group].get(last) if last else config[group]
        _require(isinstance(node, Mapping) and "_target_" in node, f"{key} names nothing that can be built", got=node,
                 allowed=f"a mapping with {key}._target_ and the keys of that class",
                 remedy=f"choose one: {group}=...; vlm-train configs list")  # fmt: skip
    for name, node in config["evaluation"]["evaluators"].items():
        key = f"evaluation.evaluators.{name}"
        _require(_is_name(name), f"{key}: the name cannot be that of a file", got=repr(name), allowed="letters, digits",
                 remedy="rename it")  # fmt: skip
        _require(isinstance(node, Mapping) and "_target_" in node, f"{key} is no evaluator", got=node,
                 allowed=f"a mapping with {key}._target_", remedy="evaluation=suite")  # fmt: skip
    for group in ("model", "objective", "optim", "schedule", "evaluation"):
        for key, value in _own_words(config[group], group):
            is_good = bool(_TARGET.fullmatch(said(value))) if key.endswith("._target_") else isinstance(value, bool)
            _require(is_good and key.endswith(("._target_", "._partial_")), f"{key} cannot take this value", got=value,
                     allowed="_target_: the dotted name of a class; _partial_: true or false; no other key with _",
                     remedy=f"vlm-train configs show {group}/CHOICE")  # fmt: skip


def _check_patch_dropout(model: Mapping[str, Any]) -> None:
    value = model.get("patch_dropout", 0)
    _require(_is_number(value) and 0 <= value < 1, "model.patch_dropout is no share that can be left out", got=value,
             allowed="0 <= share < 1", remedy="model.patch_dropout=0.5")  # fmt: skip


def _own_words(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every key that begins with _, which is Hydra's and not the class's, with its value."""
    for name, value in node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ():
        key = f"{where}.{name}"
        if str(name).startswith("_"):
            yield key, value
        else:
            yield from _own_words(value, key)


def _check_trainer(config: Mapping[str, Any]) -> None:
    trainer = config["trainer"]
    devices, num_nodes, global_batch = trainer["devices"], trainer["num_nodes"], trainer["global_batch"]
    world_size = devices * num_nodes
    _require(world_size == 1 or config["strategy"]["name"] != "single", "strategy=single runs one rank only",
             got=f"strategy.name=single trainer.devices={devices} trainer.num_nodes={num_nodes}",
             allowed="1 and 1, or a distributed strategy", remedy="add strategy=ddp")  # fmt: skip
    _require(global_batch >= world_size, "trainer.global_batch is smaller than the number of ranks",
             got=f"trainer.global_batch={global_batch} for trainer.devices={devices} trainer.num_nodes={num_nodes}",
             allowed=f">= {world_size}", remedy=f"trainer.global_batch={world_size}")  # fmt: skip
    smallest, largest = global_batch // world_size, -(-global_batch // world_size)
    num_micro_batches = -(-largest // (trainer["micro_batch"] or largest))
    _require(num_micro_batches <= smallest, "a rank would run an empty micro-batch",
             got=f"{num_micro_batches} micro-batches for {smallest} samples on a rank: trainer.devices={devices} "
             f"trainer.global_batch={global_batch} trainer.micro_batch={trainer['micro_batch']}",
             allowed=f"at most {smallest}", remedy="a larger trainer.micro_batch, or null")  # fmt: skip
    _require(num_nodes == 1, "more than one node needs a scheduler, which this version cannot submit to yet",
             got=f"trainer.num_nodes={num_nodes}", allowed="1", remedy="trainer.num_nodes=1")  # fmt: skip
    _require(not (config["precision"]["name"] == "fp16" and trainer["accelerator"] == "cpu"), "fp16 needs a GPU",
             got="precision.name=fp16 trainer.accelerator=cpu", allowed="fp32, bf16, fp64 on CPU",
             remedy="precision=bf16")  # fmt: skip
    _require((config["precision"]["name"], config["strategy"]["name"]) != ("fp16", "fsdp2"),
             "fp16 needs a scaler that a sharded strategy has not", got="precision.name=fp16 strategy.name=fsdp2",
             allowed="fp32, bf16, fp64 with fsdp2", remedy="precision=bf16")  # fmt: skip


def _check_augment(augment: Mapping[str, Any]) -> None:
    for key, low, high in (("scale", 0, 1), ("ratio", 1e-3, 1e3)):
        ends = augment[key]
        is_pair = len(ends) == 2 and all(map(_is_number, ends))
        _require(is_pair and low < ends[0] <= ends[1] <= high, f"data.augment.{key} is no range", got=ends,
                 allowed=f"[low, high], {low} < low <= high <= {high}",
                 remedy="data.augment.scale=[0.9,1.0] data.augment.ratio=[0.75,1.3333]")  # fmt: skip


def _check_shards(data: Mapping[str, Any]) -> None:
    train, val = data["train"]["shards"], data["val"]["shards"]
    _require(not isinstance(val, Mapping), "data.val.shards is a mixture", got=val, allowed="one source",
             remedy="evaluate each source by itself")  # fmt: skip
    _check_source("data.val.shards", val)
    if not isinstance(train, Mapping) or not train:
        _check_source("data.train.shards", train)
        _require(not data["pure_batches"], "there is one source, so every batch is of one source",
                 got="data.pure_batches=true", allowed="false, or a mixture in data.train.shards",
                 remedy="data.pure_batches=false")  # fmt: skip
        return
    for name, source in train.items():
        _check_member(f"data.train.shards.{name}", name, source)
    check_weights({f"data.train.shards.{name}": source.get("weight", 1.0) for name, source in train.items()})
    _require(len(set(map(str, train))) == len(train), "two sources of data.train.shards have the same name",
             got=", ".join(map(repr, train)), allowed="a name of its own for each", remedy="rename one")  # fmt: skip
    _require(data["selection"] is None, "data.selection is for a single source of data.train.shards",
             got=f"data.selection={data['selection']}", allowed="one for each source",
             remedy="data.train.shards.NAME.selection=DIR")  # fmt: skip
    _require(len(train) < 2 or data["epoch_end"] == "wrap", "the sources of data.train.shards have no common epoch",
             got=f"data.epoch_end={data['epoch_end']}", allowed="wrap", remedy="data.epoch_end=wrap")  # fmt: skip


def _check_source(key: str, shards: object) -> None:
    listed = shards if isinstance(shards, list) else [shards]
    _require(bool(listed) and all(map(_is_text, listed)), f"{key} names no shards", got=shards,
             allowed="a folder, a glob, a brace pattern, a URL, or a list of these, as texts",
             remedy=f"{key}='path/{{00000..00012}}.tar'")  # fmt: skip


def _check_member(key: str, name: object, source: object) -> None:
    is_named = isinstance(name, str | int) and not isinstance(name, bool) and bool(str(name).strip())
    _require(is_named, f"{key}: a source needs a name", got=repr(name), allowed="a text", remedy="rename it")
    _require(isinstance(source, Mapping) and "shards" in source and set(source) <= {"shards", "weight", "selection"},
             f"{key} is no source of a mixture", got=source, allowed="shards, and if wanted weight and selection",
             remedy=f"{key}={{shards: PATH, weight: 1.0}}")  # fmt: skip
    assert isinstance(source, Mapping)
    _check_source(f"{key}.shards", source["shards"])
    selection = source.get("selection")
    _require(selection is None or _is_place(selection), f"{key}.selection is no path on a local disk",
             got=selection, allowed="the folder of a selection", remedy=f"{key}.selection=DIR")  # fmt: skip


def _check_streaming(data: Mapping[str, Any]) -> None:
    if not data["streaming"]:
        return
    _require(not isinstance(data["train"]["shards"], Mapping), "a mixture cannot be streamed",
             got="data.streaming=true, several sources in data.train.shards", allowed="one source",
             remedy="data.streaming=false")  # fmt: skip
    _require(data["selection"] is None, "a selection needs a manifest, which a stream has not",
             got=f"data.streaming=true data.selection={data['selection']}", allowed="data.selection=null",
             remedy="data.streaming=false")  # fmt: skip
    _require(data["epoch_end"] == "wrap", "a stream cannot tell where its epoch ends before it does",
             got=f"data.streaming=true data.epoch_end={data['epoch_end']}", allowed="data.epoch_end=wrap",
             remedy="data.epoch_end=wrap")  # fmt: skip


def _check_stages(stages: Mapping[str, Any]) -> None:
    for name, changes in stages.items():
        is_one = _is_name(name) and isinstance(changes, Mapping) and set(changes).isdisjoint(("run", "init", "stages"))
        _require(is_one, f"stages.{name} is no stage", got=said(changes),
                 allowed="the name of a folder, and a mapping of config keys without run, init and stages",
                 remedy="stages.tuned.trainer.max_steps=1000")  # fmt: skip
