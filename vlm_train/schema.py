"""The shape of a config, and everything about it that can be refused before torch is imported.

1. Dataclasses give every root key and every key of the plain groups a type; Hydra merges YAML and overrides into them,
   so a misspelt key cannot pass silently.
2. `check` refuses impossible values and combinations (`checks`: what, got, allowed, remedy).
3. Keys of `_target_` nodes are compared with the constructor they name (signatures.py).
4. `learning_view` is the part of a config that says what is learned. Two configs with an equal view may resume each
   other's runs; everything else is the machine's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlm_train.checks.config import check_values
from vlm_train.errors import ConfigError, nearest
from vlm_train.locations import identity, in_texts
from vlm_train.signatures import check_targets


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
    micro_batch: int | str | None = None  # samples a rank runs forward at once; null: its share; auto: what fits
    micro_tokens: int | None = None  # and at most so many tokens of dialogues, those of their images included
    micro_images: int | None = None  # and at most so many images of dialogues, each tile one
    devices: int = 1
    num_nodes: int = 1
    accelerator: str = "auto"  # auto | cpu | gpu
    deterministic: bool | None = None  # null: true on CPU, false elsewhere
    num_threads: int | None = None  # torch threads of a rank; null: cores / ranks
    hang_seconds: float | None = None  # without progress until the run is ended; null: by its own steps; 0: never


@dataclass
class SplitConfig:
    """Where a split lies: a folder, a glob, a brace pattern, a URL, or a list of these; for training also a mixture,
    {name: {shards, weight, selection, captions, groups}}."""

    shards: Any = None


@dataclass
class AugmentConfig:
    """Random resized crop (share of the area, aspect ratio), mirroring, colours; the last three are probabilities or
    strengths in 0..1."""

    scale: tuple[float, float] | None = (0.9, 1.0)  # null: no crop, pictures are laid out as in evaluation
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
    captions: str | None = None  # of the training split: a table by `data recaption`, or any Parquet file of that form
    groups: Any = None  # {walk: DIR, size: N}: batches are made of groups of N samples that are alike
    classes: str | None = None  # classes.json of the dataset, for zero-shot classification
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    template: str = "plain"  # how a dialogue is written: plain (captions alone), vicuna, llama3, chatml, mistral, own
    system: str | None = None  # what a dialogue begins with; null: what the template says
    hard_captions: int = 0  # of KEY.json's `negatives`, how many each sample brings as further wrong answers
    num_workers: int = 1
    shuffle_window: int = 64  # shards mixed together; 0 keeps the order of the files
    epoch_end: str = "drop"
    pure_batches: bool = False  # of a mixture: all samples of a step from one source
    max_error_rate: float = 0.01
    streaming: bool = False  # read tars from front to back: for what cannot be read at random
    shuffle_buffer: int = 1000  # samples mixed together where data.streaming is on; 0 keeps the order of the files
    cache_gb: float = 20.0  # of the local disk, for shards of servers
    retry_seconds: float = 300.0  # how long a read goes on trying when a server does not answer


@dataclass
class SpikesConfig:
    """Which steps are refused, and what follows: the run goes back and leaves out the data before them."""

    threshold: float | None = None  # deviations above the median of the last losses; null: only what is not finite
    window: int = 100  # how many losses; before there are as many, only what is not finite is refused
    rewind_steps: int = 0  # steps before the refused one that are taken back too, with their data (PaLM: about 100)
    max_rewinds: int = 3  # in the whole run; at the next one it ends with an error


@dataclass
class CheckpointConfig:
    """When state is written, how, and how many committed checkpoints stay."""

    every_steps: int = 100
    keep: int = 2
    keep_every_steps: int | None = None  # of these one in so many steps stays for ever
    asynchronous: bool = True  # a copy of the state is written while training goes on; false: no copy, training waits
    copy_to: str | None = None  # URL of a folder that gets a copy of each checkpoint, to go on from on another machine


@dataclass
class StrategyConfig:
    """How ranks share the work and the memory."""

    name: str = MISSING
    recompute: bool = False  # compute the activations of a block again in the backward pass instead of keeping them
    feature_store: str | None = None  # a folder that keeps what a frozen image tower makes of pictures
    feature_store_gb: float = 100.0  # of the disk, for all of that folder


@dataclass
class PrecisionConfig:
    """Arithmetic of the towers; losses and temperatures are always fp32 or better."""

    name: str = MISSING


@dataclass
class CompileConfig:
    """torch.compile, block by block."""

    enabled: bool = MISSING


@dataclass
class AttentionConfig:
    """Which kernel computes the attention of our towers; models/attention.py."""

    name: str = "sdpa"  # runs of before this key have it too


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
    init: Any = None  # a run or a checkpoint whose weights this one starts from, or PART: such
    stages: dict[str, Any] = field(default_factory=dict)  # name -> changes; trained one after another
    model: Any = MISSING
    objective: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: Any = MISSING
    schedule: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


WHOLE = "the model"  # where parts are named: all of it
MACHINE_KEYS = (
    "run", "strategy", "compile", "attention", "checkpoint", "evaluation", "logger", "trainer.devices",
    "trainer.num_nodes", "trainer.micro_batch", "trainer.micro_tokens", "trainer.micro_images",
    "trainer.accelerator", "trainer.deterministic", "trainer.num_threads", "trainer.hang_seconds",
    "spikes.max_rewinds", "data.num_workers", "data.max_error_rate", "data.cache_gb", "data.retry_seconds",
    "data.val", "data.classes",
)  # fmt: skip


def read_config(run: Path) -> DictConfig:
    """The resolved config of the run in a folder. Raises ConfigError where there is none, or nobody can read it."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is no run: it has no config.yaml", remedy="name a run: runs/<experiment>/latest")
    return load_config(file)


def load_config(file: Path) -> DictConfig:
    """A resolved config as `vlm-train` wrote it. Raises ConfigError where nobody can read it."""
    try:
        config, why = OmegaConf.load(file), "it holds no keys"
        OmegaConf.resolve(config)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        config, why = None, str(error)
    if not isinstance(config, DictConfig) or not config:
        raise ConfigError(f"{file} is damaged", got=why, allowed="the config as vlm-train wrote it",
                          remedy="restore it from a copy, or start another run: run.id=NAME")  # fmt: skip
    return config


def plain(value: Any) -> Any:
    """A node of the config as dicts and lists; other values as they are."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def learning_view(config: DictConfig) -> dict[str, Any]:
    """The resolved config as flat dotted keys, without what only the machine or the observer decides.

    A URL that was only signed anew, or got another password, says the same. Weights to start from are known by their
    hash, and stages have an order.
    """
    plain = in_texts(identity, OmegaConf.to_container(config, resolve=True))
    flat = {key: value for key, value in flatten(plain).items() if not _is_machines(key)}
    flat.update({key: flat[key].rpartition("@")[2] for key in flat if _under(key, "init") and flat[key]})
    if plain.get("stages"):
        flat["stages"] = " ".join(plain["stages"])
    return flat


def by_part(init: Any) -> dict[str, str]:
    """`init` of a config as part of the model -> run; `WHOLE` is all of it."""
    return dict(init) if isinstance(init, Mapping) else {WHOLE: init} if init else {}


def _is_machines(key: str) -> bool:
    """Whether a key, or what a stage changes by it, is the machine's business."""
    if key.startswith("stages."):
        key = key.split(".", 2)[-1]
    how_a_loss_is_computed = _under(key, "objective") and key.endswith(".implementation")
    return how_a_loss_is_computed or any(_under(key, machine) for machine in MACHINE_KEYS)


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


def check(config: DictConfig) -> None:
    """Refuses what cannot run. Raises ConfigError."""
    absent = [name for name in Config.__dataclass_fields__ if name not in config]
    missing = sorted([*absent, *OmegaConf.missing_keys(config)])
    if missing:
        raise ConfigError(f"{', '.join(missing)} has no value", got="nothing", allowed="a value",
                          remedy=f"add {missing[0]}=...")  # fmt: skip
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for key in _unknown_keys(plain, Config):
        close = nearest(key, flatten(plain))
        raise ConfigError(f"no such key: {key}", got=key, allowed=", ".join(close) or "the keys of the schema",
                          remedy=f"{close[0]}=..." if close else "vlm-train configs keys")  # fmt: skip
    check_values(plain)
    check_targets(plain)


def _unknown_keys(node: Mapping[str, Any], kind: type, where: str = "") -> Iterator[str]:
    """Keys that nothing would ever read: `+key=value` can add them to any node."""
    kinds = get_type_hints(kind)
    for name, value in node.items():
        if name not in kinds:
            yield f"{where}{name}"
        elif is_dataclass(kinds[name]) and isinstance(value, Mapping):
            yield from _unknown_keys(value, kinds[name], f"{where}{name}.")
