"""What the values of a config must be, alone and together: refused before torch is imported.

Every refusal says what, got, allowed and remedy. `config` is a composed config with the keys of `schema.Config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_train.errors import ConfigError

STRATEGIES = ("single", "ddp")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
EPOCH_ENDS = ("drop", "wrap", "pad_zero_weight")


def check_values(config: Any) -> None:
    """Refuses what cannot run. Raises ConfigError."""
    _check_trainer(config)
    _check_data(config)
    _choice("strategy.name", config.strategy.name, STRATEGIES)
    _choice("precision.name", config.precision.name, PRECISIONS)
    _choice("logger.name", config.logger.name, ("none", "wandb"))
    _choice("logger.mode", config.logger.mode, ("online", "offline"))
    _require(config.checkpoint.keep >= 1, "checkpoint.keep is too small", got=config.checkpoint.keep, allowed=">= 1")
    _require(
        config.checkpoint.every_steps >= 1,
        "checkpoint.every_steps is too small",
        got=config.checkpoint.every_steps,
        allowed=">= 1",
        remedy="one checkpoint is always written at the end",
    )


def _require(holds: bool, what: str, *, got: object = None, allowed: object = None, remedy: str | None = None) -> None:
    if not holds:
        raise ConfigError(what, got=got, allowed=allowed, remedy=remedy)


def _choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    group = key.removesuffix(".name")
    _require(value in allowed, f"{key} is not known", got=value, allowed=", ".join(allowed),
             remedy=f"{group}={allowed[0]}" if key.endswith(".name") else f"{key}={allowed[0]}")  # fmt: skip


def _check_trainer(config: Any) -> None:
    trainer = config.trainer
    for key in ("max_steps", "global_batch", "devices", "num_nodes", "micro_batch", "num_threads"):
        value = trainer[key]
        _require(value is None or value >= 1, f"trainer.{key} must be positive", got=value, allowed=">= 1")
    _choice("trainer.accelerator", trainer.accelerator, ("auto", "cpu", "gpu"))
    world_size = trainer.devices * trainer.num_nodes
    _require(world_size == 1 or config.strategy.name != "single", "strategy=single runs one rank only",
             got=f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}",
             allowed="1 and 1, or a distributed strategy", remedy="add strategy=ddp")  # fmt: skip
    _require(trainer.global_batch >= world_size, "trainer.global_batch is smaller than the number of ranks",
             got=f"{trainer.global_batch} samples for {world_size} ranks", allowed=f">= {world_size}")  # fmt: skip
    smallest, largest = trainer.global_batch // world_size, -(-trainer.global_batch // world_size)
    num_micro_batches = -(-largest // (trainer.micro_batch or largest))
    _require(num_micro_batches <= smallest, "a rank would run an empty micro-batch",
             got=f"{num_micro_batches} micro-batches for {smallest} samples on a rank",
             allowed=f"at most {smallest}", remedy="a larger trainer.micro_batch, or null")  # fmt: skip
    _require(trainer.num_nodes == 1, "more than one node needs a scheduler, which this version cannot submit to yet",
             got=f"trainer.num_nodes={trainer.num_nodes}", allowed="1", remedy="trainer.num_nodes=1")  # fmt: skip
    _require(
        not (config.precision.name == "fp16" and trainer.accelerator == "cpu"),
        "fp16 needs a GPU",
        got="precision=fp16 trainer.accelerator=cpu",
        allowed="fp32, bf16, fp64 on CPU",
        remedy="precision=bf16",
    )


def _check_data(config: Any) -> None:
    data = config.data
    _choice("data.epoch_end", data.epoch_end, EPOCH_ENDS)
    for split in ("train", "val"):
        _require(bool(data[split].shards), f"data.{split}.shards has no value",
                 allowed="a folder, a glob, a brace pattern, or a list of these",
                 remedy=f"data.{split}.shards='path/{{00000..00012}}.tar'")  # fmt: skip
    low, high = data.augment.scale
    _require(0 < low <= high <= 1, "data.augment.scale is no share of the image", got=[low, high],
             allowed="0 < low <= high <= 1", remedy="data.augment.scale=[0.9,1.0]")  # fmt: skip
    low, high = data.augment.ratio
    _require(0 < low <= high, "data.augment.ratio is no range of aspect ratios", got=[low, high],
             allowed="0 < low <= high", remedy="data.augment.ratio=[0.75,1.3333]")  # fmt: skip
    _require(
        0 <= data.augment.flip <= 1, "data.augment.flip is no probability", got=data.augment.flip, allowed="0 to 1"
    )
    _check_mixture(data)
    _check_streaming(data)
    _require(data.num_workers >= 0, "data.num_workers must not be negative", got=data.num_workers, allowed=">= 0")
    for key in ("shuffle_window", "shuffle_buffer", "cache_gb", "retry_seconds"):
        _require(data[key] >= 0, f"data.{key} must not be negative", got=data[key], allowed=">= 0")
    _require(
        0 <= data.max_error_rate <= 1, "data.max_error_rate is no share", got=data.max_error_rate, allowed="0 to 1"
    )


def _check_mixture(data: Any) -> None:
    _require(not _is_mapping(data.val.shards), "data.val.shards is a mixture", allowed="one source",
             remedy="evaluate each source by itself")  # fmt: skip
    if not _is_mapping(data.train.shards):
        return
    for name, source in data.train.shards.items():
        keys = sorted(source) if _is_mapping(source) else type(source).__name__
        _require(_is_mapping(source) and "shards" in source and set(source) <= {"shards", "weight", "selection"},
                 f"data.train.shards.{name} is no source of a mixture", got=keys,
                 allowed="shards, and if wanted weight and selection",
                 remedy=f"data.train.shards.{name}={{shards: PATH, weight: 1.0}}")  # fmt: skip
    _require(data.selection is None, "data.selection is for a single source", got=data.selection,
             allowed="one for each source", remedy="data.train.shards.NAME.selection=DIR")  # fmt: skip
    _require(len(data.train.shards) < 2 or data.epoch_end == "wrap", "the sources of a mixture have no common epoch",
             got=f"data.epoch_end={data.epoch_end}", allowed="wrap", remedy="data.epoch_end=wrap")  # fmt: skip


def _check_streaming(data: Any) -> None:
    if not data.streaming:
        return
    _require(not _is_mapping(data.train.shards), "a mixture cannot be streamed", got="data.streaming=true",
             allowed="one source", remedy="data.streaming=false")  # fmt: skip
    _require(data.selection is None, "a selection needs a manifest, which a stream has not", got=data.selection,
             allowed="data.selection=null", remedy="data.streaming=false")  # fmt: skip
    _require(data.epoch_end == "wrap", "a stream cannot tell where its epoch ends before it does",
             got=f"data.epoch_end={data.epoch_end}", allowed="wrap", remedy="data.epoch_end=wrap")  # fmt: skip


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)
