"""What the values of a config must be, alone and together: refused before torch is imported.

Every refusal names the key and says what, got, allowed and remedy. `config` is a resolved config with the keys of
`schema.Config` and values of its types, as plain dicts and lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_train.checks.data import check_data
from vlm_train.checks.values import LARGEST, MANY, is_name, is_number, is_place, is_text, require, said

STRATEGIES = ("single", "ddp", "fsdp2")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
TEMPLATES = ("plain", "vicuna", "llama3", "chatml", "mistral", "own")
OWN_TOKENS = ("<|pad|>", "<|startoftext|>", "<|endoftext|>")  # of data/tokenizer.py
EPOCH_ENDS = ("drop", "wrap", "pad_zero_weight")

_RANGES: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    "trainer.max_steps": (1, MANY),
    "trainer.global_batch": (1, MANY),
    "trainer.micro_batch": (1, MANY),  # or auto
    "trainer.micro_tokens": (1, MANY),
    "trainer.micro_images": (1, MANY),
    **dict.fromkeys(("trainer.devices", "trainer.num_nodes", "trainer.num_threads"), (1, 1024)),
    "trainer.hang_seconds": (0, 10**6),
    "data.hard_captions": (0, 1024),
    "data.num_workers": (0, 1024),
    **dict.fromkeys(("data.shuffle_window", "data.shuffle_buffer"), (0, MANY)),
    **dict.fromkeys(("data.cache_gb", "data.retry_seconds"), (0, 10**9)),
    "data.max_error_rate": (0, 1),
    **dict.fromkeys(("data.augment.flip", "data.augment.color_jitter", "data.augment.grayscale"), (0, 1)),
    "strategy.feature_store_gb": (0, 10**9),
    "spikes.threshold": (0, 10**6),
    "spikes.window": (2, 10_000),
    "spikes.rewind_steps": (0, MANY),
    "spikes.max_rewinds": (0, MANY),
    "checkpoint.every_steps": (1, MANY),
    "checkpoint.keep": (1, MANY),
    "checkpoint.keep_every_steps": (1, MANY),
    "evaluation.every_steps": (0, MANY),
    "evaluation.batch_size": (1, MANY),
}
_AUTO = "trainer.micro_batch", "auto"  # the word that one of them takes beside numbers
_CHOICES = {
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "data.epoch_end": EPOCH_ENDS,
    "data.template": TEMPLATES,
    "strategy.name": STRATEGIES,
    "precision.name": PRECISIONS,
    "attention.name": ("sdpa", "flash", "xformers", "eager"),
    "logger.name": ("none", "wandb"),
    "logger.mode": ("online", "offline"),
}
_NAMES = ("run.experiment", "run.id")
_PLACES = ("run.dir", "run.resume", "data.selection", "data.captions", "data.classes", "strategy.feature_store")
_TEXTS = ("logger.project", "logger.entity")
_PARTS = ("model", "model.vision", "model.text", "model.tokenizer", "objective", "optim", "schedule")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_values(config: Mapping[str, Any]) -> None:
    """Refuses what cannot run. Raises ConfigError."""
    for key, (low, high) in _RANGES.items():
        value = _at(config, key)
        holds = value is None or (is_number(value) and low <= value <= high) or (key, value) == _AUTO
        words = ", or auto" if key == _AUTO[0] else ""
        require(holds, f"{key} is out of range", got=value, allowed=f"{low} to {high}{words}",
                remedy=f"vlm-train configs search {key}")  # fmt: skip
    for key, allowed in _CHOICES.items():
        word = key.removesuffix(".name")  # the group of the same name has a choice for each
        require(_at(config, key) in allowed, f"{key} is not known", got=_at(config, key), allowed=", ".join(allowed),
                remedy=f"{word}={allowed[0]}")  # fmt: skip
    _check_words(config)
    _check_parts(config)
    _check_patch_dropout(config["model"])
    _check_special_tokens(config["model"]["tokenizer"])
    _check_trainer(config)
    _check_checkpoint(config["checkpoint"])
    check_data(config["data"], config["trainer"]["global_batch"])
    _check_stages(config["stages"])
    for key, value in _leaves(config):
        require(not isinstance(value, int | float) or abs(value) <= LARGEST, f"{key} is not finite", got=value,
                allowed="a finite number", remedy=f"vlm-train configs search {key}")  # fmt: skip


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


def _check_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    every, kept, copy_to = (checkpoint[key] for key in ("every_steps", "keep_every_steps", "copy_to"))
    require(kept is None or kept % every == 0, "checkpoint.keep_every_steps is no multiple of checkpoint.every_steps",
            got=kept, allowed=f"a multiple of {every}", remedy=f"checkpoint.keep_every_steps={10 * every}")  # fmt: skip
    require(copy_to is None or "://" in copy_to, "checkpoint.copy_to is no URL", got=repr(copy_to),
            allowed="a folder as s3://..., gs://... or file:///...", remedy="leave it out")  # fmt: skip


def _check_words(config: Mapping[str, Any]) -> None:
    for key in _NAMES:
        value = _at(config, key)
        require(value is None or (is_name(value) and value != "latest"), f"{key} cannot name a folder",
                got=repr(value), allowed="letters, digits and signs without / and spaces; not `latest`",
                remedy=f"{key}=mine")  # fmt: skip
    init = config["init"]
    starts = {f"init.{part}": run or "" for part, run in init.items()} if isinstance(init, Mapping) else {"init": init}
    for key, value in [*((key, _at(config, key)) for key in _PLACES), *starts.items()]:
        require(value is None or is_place(value), f"{key} is no path on a local disk", got=repr(value),
                allowed="a path", remedy=f"{key}=PATH, or leave it out")  # fmt: skip
    for key in _TEXTS:
        value = _at(config, key)
        require(value is None or is_text(value), f"{key} is empty", got=repr(value), allowed="a name",
                remedy=f"{key}=NAME, or leave it out")  # fmt: skip


def _check_parts(config: Mapping[str, Any]) -> None:
    """Whether what is built from a class says which; `signatures.py` compares the keys with that class."""
    for key in (key for key in _PARTS if key != "model.vision" or "vision" in config["model"]):
        group, _, last = key.partition(".")
        node = config[group].get(last) if last else config[group]
        require(isinstance(node, Mapping) and "_target_" in node, f"{key} names nothing that can be built", got=node,
                allowed=f"a mapping with {key}._target_ and the keys of that class",
                remedy=f"choose one: {group}=...; vlm-train configs list")  # fmt: skip
    for name, node in config["evaluation"]["evaluators"].items():
        key = f"evaluation.evaluators.{name}"
        require(is_name(name), f"{key}: the name cannot be that of a file", got=repr(name), allowed="letters, digits",
                remedy="rename it")  # fmt: skip
        require(isinstance(node, Mapping) and "_target_" in node, f"{key} is no evaluator", got=node,
                allowed=f"a mapping with {key}._target_", remedy="evaluation=suite")  # fmt: skip
    for group in ("model", "objective", "optim", "schedule", "evaluation"):
        for key, value in _own_words(config[group], group):
            is_good = bool(_TARGET.fullmatch(said(value))) if key.endswith("._target_") else isinstance(value, bool)
            require(is_good and key.endswith(("._target_", "._partial_")), f"{key} cannot take this value", got=value,
                    allowed="_target_: the dotted name of a class; _partial_: true or false; no other key with _",
                    remedy=f"vlm-train configs show {group}/CHOICE")  # fmt: skip


def _check_patch_dropout(model: Mapping[str, Any]) -> None:
    value = model.get("patch_dropout", 0)
    require(is_number(value) and 0 <= value < 1, "model.patch_dropout is no share that can be left out", got=value,
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
    require(world_size == 1 or config["strategy"]["name"] != "single", "strategy=single runs one rank only",
            got=f"strategy.name=single trainer.devices={devices} trainer.num_nodes={num_nodes}",
            allowed="1 and 1, or a distributed strategy", remedy="add strategy=ddp")  # fmt: skip
    require(global_batch >= world_size, "trainer.global_batch is smaller than the number of ranks",
            got=f"trainer.global_batch={global_batch} for trainer.devices={devices} trainer.num_nodes={num_nodes}",
            allowed=f">= {world_size}", remedy=f"trainer.global_batch={world_size}")  # fmt: skip
    smallest, largest = global_batch // world_size, -(-global_batch // world_size)
    is_auto = trainer["micro_batch"] == _AUTO[1]  # which takes no such size
    num_micro_batches = 1 if is_auto else -(-largest // (trainer["micro_batch"] or largest))
    require(num_micro_batches <= smallest, "a rank would run an empty micro-batch",
            got=f"{num_micro_batches} micro-batches for {smallest} samples on a rank: trainer.devices={devices} "
            f"trainer.global_batch={global_batch} trainer.micro_batch={trainer['micro_batch']}",
            allowed=f"at most {smallest}", remedy="a larger trainer.micro_batch, or null")  # fmt: skip
    bounds = [f"trainer.{key}={trainer[key]}" for key in ("micro_tokens", "micro_images") if trainer[key] is not None]
    require(not (is_auto and bounds), "trainer.micro_batch=auto makes room for the longest dialogues, and another key "
            "bounds micro-batches by what dialogues hold", got=f"trainer.micro_batch=auto {' '.join(bounds)}",
            allowed="one or the other", remedy="trainer.micro_batch=null, or leave out the others")  # fmt: skip
    require(not (config["precision"]["name"] == "fp16" and trainer["accelerator"] == "cpu"), "fp16 needs a GPU",
            got="precision.name=fp16 trainer.accelerator=cpu", allowed="fp32, bf16, fp64 on CPU",
            remedy="precision=bf16")  # fmt: skip
    require((config["precision"]["name"], config["strategy"]["name"]) != ("fp16", "fsdp2"),
            "fp16 needs a scaler that a sharded strategy has not", got="precision.name=fp16 strategy.name=fsdp2",
            allowed="fp32, bf16, fp64 with fsdp2", remedy="precision=bf16")  # fmt: skip


def _check_special_tokens(tokenizer: Mapping[str, Any]) -> None:
    tokens = tokenizer.get("special_tokens", [])
    is_good = isinstance(tokens, list) and all(isinstance(token, str) and len(token) > 1 for token in tokens)
    require(is_good and len({*tokens, *OWN_TOKENS}) == len(tokens) + len(OWN_TOKENS),
            "model.tokenizer.special_tokens are no special tokens", got=said(tokens),
            allowed=f"a list of different texts of two letters or more, none of {', '.join(OWN_TOKENS)}",
            remedy='model.tokenizer.special_tokens=["<|im_start|>","<|im_end|>"]')  # fmt: skip


def _check_stages(stages: Mapping[str, Any]) -> None:
    for name, changes in stages.items():
        is_one = is_name(name) and isinstance(changes, Mapping) and set(changes).isdisjoint(("run", "init", "stages"))
        require(is_one, f"stages.{name} is no stage", got=said(changes),
                allowed="the name of a folder, and a mapping of config keys without run, init and stages",
                remedy="stages.tuned.trainer.max_steps=1000")  # fmt: skip
