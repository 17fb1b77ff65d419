"""The shape of a config, and everything about it that can be refused before torch is imported.

1. Dataclasses give every root key and every key of the plain groups a type; Hydra merges YAML and overrides into them,
   so a misspelt key cannot pass silently.
2. `check` refuses impossible combinations (what, got, allowed, remedy).
3. Keys of `_target_` nodes are compared with the constructor they name (signatures.py).
4. `learning_view` is the part of a config that says what is learned. Two configs with an equal view may resume each
   other's runs; everything else is the machine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from vlm_train.errors import ConfigError
from vlm_train.signatures import check_targets

STRATEGIES = ("single", "ddp")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
EPOCH_ENDS = ("drop", "wrap", "pad_zero_weight")


@dataclass
class RunConfig:
    """Which run this is. `dir` overrides runs/<experiment>/<id>."""

    experiment: str | None = None
    id: str | None = None
    dir: str | None = None
    resume: str = "auto"  # auto | never | path of a run or checkpoint


@dataclass
class TrainerConfig:
    """How long, how large, and on how many ranks."""

    max_steps: int = MISSING
    global_batch: int = MISSING
    micro_batch: int | None = None  # images one rank runs forward at once; null: its whole share
    devices: int = 1
    num_nodes: int = 1
    accelerator: str = "auto"  # auto | cpu | gpu
    deterministic: bool | None = None  # null: true on CPU, false elsewhere
    num_threads: int | None = None  # torch threads of a rank; null: cores / ranks


@dataclass
class SplitConfig:
    """Where a split lies: a folder, a glob, a brace pattern, or a list of these."""

    shards: Any = None


@dataclass
class AugmentConfig:
    """Random resized crop (share of the area, aspect ratio), mirroring, colours; the last three are probabilities or
    strengths in 0..1."""

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333333)
    flip: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0


@dataclass
class DataConfig:
    """What is read, in what order, and how bad it may be."""

    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    selection: str | None = None
    classes: str | None = None  # classes.json of the dataset, for zero-shot classification
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_workers: int = 1
    shuffle_window: int = 64
    epoch_end: str = "drop"
    max_error_rate: float = 0.01


@dataclass
class CheckpointConfig:
    """When state is written and how many committed checkpoints stay."""

    every_steps: int = 100
    keep: int = 2


@dataclass
class StrategyConfig:
    """How ranks share the work."""

    name: str = MISSING


@dataclass
class PrecisionConfig:
    """Arithmetic of the towers; losses and temperatures are always fp32 or better."""

    name: str = MISSING


@dataclass
class CompileConfig:
    """torch.compile, block by block."""

    enabled: bool = MISSING


@dataclass
class EvaluationConfig:
    """What is measured, every how many steps (0: only at the end), with how many samples a batch."""

    every_steps: int = 0
    batch_size: int = 256
    evaluators: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoggerConfig:
    """Where metrics.jsonl is mirrored to. `name`: none or wandb; `mode`: online or offline."""

    name: str = MISSING
    project: str = "vlm-train"
    entity: str | None = None
    mode: str = "online"


@dataclass
class Config:
    """The root of every training config."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    model: Any = MISSING
    objective: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: Any = MISSING
    schedule: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


MACHINE_KEYS = (
    "run",
    "strategy",
    "compile",
    "checkpoint",
    "evaluation",
    "logger",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.micro_batch",
    "trainer.accelerator",
    "trainer.deterministic",
    "trainer.num_threads",
    "data.num_workers",
    "data.max_error_rate",
    "data.val",
    "data.classes",
)


def learning_view(config: DictConfig) -> dict[str, Any]:
    """The resolved config as flat dotted keys, without what only the machine or the observer decides."""
    flat = flatten(OmegaConf.to_container(config, resolve=True))
    return {key: value for key, value in flat.items() if not any(_under(key, machine) for machine in MACHINE_KEYS)}


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys; lists are values."""
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _under(key: str, parent: str) -> bool:
    return key == parent or key.startswith(parent + ".")


def _require(holds: bool, what: str, *, got: object = None, allowed: object = None, remedy: str | None = None) -> None:
    if not holds:
        raise ConfigError(what, got=got, allowed=allowed, remedy=remedy)


def check(config: DictConfig) -> None:
    """Refuses what cannot run. Raises ConfigError."""
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key} has no value", allowed="a value", remedy=f"add {key}=...")
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
    check_targets(OmegaConf.to_container(config, resolve=True))


def _choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    group = key.removesuffix(".name")
    _require(value in allowed, f"{key} is not known", got=value, allowed=", ".join(allowed),
             remedy=f"{group}={allowed[0]}" if key.endswith(".name") else f"{key}={allowed[0]}")  # fmt: skip


def _check_trainer(config: DictConfig) -> None:
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


def _check_data(config: DictConfig) -> None:
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
    _require(data.num_workers >= 0, "data.num_workers must not be negative", got=data.num_workers, allowed=">= 0")
    _require(
        0 <= data.max_error_rate <= 1, "data.max_error_rate is no share", got=data.max_error_rate, allowed="0 to 1"
    )
