"""The composition root: the only caller of hydra's instantiate, in the order of a sample's road.

`prepare` makes what every rank will read (manifests, tokenizer); `training.py` joins the parts to the run of a rank;
`load` brings back a trained run for evaluation, search and export. Nothing here waits for Lightning, which takes longer
to import than everything else together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from vlm_train import origins
from vlm_train.data import building
from vlm_train.data.collate import SampleEncoder
from vlm_train.data.dialogue import DialogueEncoder
from vlm_train.data.indexing import Progress
from vlm_train.data.picture_files import open_picture
from vlm_train.data.pieces import inner_of
from vlm_train.data.pipeline import EvalLoader, TrainLoader
from vlm_train.data.steps import StreamSpec
from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.data.transforms import EvalTransform, TrainTransform
from vlm_train.engine import checkpoints
from vlm_train.engine.bad_samples import record_left_out
from vlm_train.engine.evaluation import AUTOCAST, EvaluationSuite
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import CheckpointError, ConfigError, VlmError
from vlm_train.evaluation.answering import Answerer, check_asked
from vlm_train.evaluation.base import Embedder
from vlm_train.models.bound_encoder import BoundEncoder
from vlm_train.objectives.base import Objective, check_outputs
from vlm_train.objectives.distill import Distill
from vlm_train.schema import plain, read_config
from vlm_train.types import DialogueSpec, Evaluator, ImageSpec, Jumps, ModalitySpec, Source, TextSpec, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int

    @staticmethod
    def from_environment() -> Placement:
        """As torchrun, srun's wrapper or our own launcher set it; alone otherwise."""
        return Placement(rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A model and what belongs to it."""

    config: DictConfig
    tokenizer: Tokenizer
    model: nn.Module
    objective: Objective

    @property
    def modalities(self) -> tuple[ModalitySpec, ...]:
        """What the model's towers read beside images and texts."""
        modalities: Any = self.model.modalities
        return tuple(modalities)

    @property
    def image_spec(self) -> ImageSpec:
        """What the image tower wants to be fed."""
        spec = self.model.image_spec
        assert isinstance(spec, ImageSpec)
        return spec


def prepare(config: DictConfig, run: RunDirectory, *, fresh: bool, progress: Progress) -> None:
    """Indexes the shards and, for a `fresh` run, trains or copies the tokenizer; once, before any rank starts."""
    data = plain(config.data)
    for split in ("train", "val"):
        found = list(building.manifests(data, split, progress))
        errors = [error for manifest in found for error in manifest.errors()]
        limit = 1.0 if split == "train" and data.get("selection") else config.data.max_error_rate  # holds no bad one
        record_left_out(run if fresh else None, split, errors, sum(map(len, found)), max_error_rate=limit)
    building.check_train(data, stream_spec(config))
    if not fresh:
        return
    tokenizer: Any = origins.tokenizer(config) or make(config.model.tokenizer)
    if _waits(tokenizer):
        reads_dialogues = "dialogue_labels" in make(config.objective).reads
        tokenizer = tokenizer(building.train_captions(data, with_dialogues=reads_dialogues))
    tokenizer.save(str(run.tokenizer))


def _waits(tokenizer: Any) -> bool:
    """Whether this is a tokenizer that is trained: a partial that waits for captions."""
    return callable(getattr(tokenizer, "func", None))


def network(config: DictConfig, tokenizer: Tokenizer, *, with_values: bool = True) -> Parts:
    """Model and objective, initialised from the seed, or the model's shapes alone, on the meta device; keys that do not
    fit each other are refused here."""
    torch.manual_seed(config.seed)
    node = {key: value for key, value in config.model.items() if key not in ("text", "tokenizer")}
    with nullcontext() if with_values else torch.device("meta"):
        text = make(config.model.text, {"spec": tokenizer.spec})
        model = make(node, {"text": text})
    objective = make(config.objective)
    check_outputs(objective, model.outputs)
    _narrow(model, objective)
    return Parts(config=config, tokenizer=tokenizer, model=model, objective=objective)


def _narrow(model: nn.Module, objective: Objective) -> None:
    """Towers that the objective does not ask for are not run."""
    if isinstance(model, BoundEncoder):
        model.give_only(objective.requires)


def encoder(parts: Parts, *, train: bool) -> SampleEncoder:
    """Bytes to tensors: augmented for training, deterministic for evaluation."""
    config, spec = parts.config, parts.image_spec
    transform = TrainTransform(spec=spec, **plain(config.data.augment)) if train else EvalTransform(spec=spec)
    on_gpu = config.trainer.accelerator in ("gpu", "auto") and torch.cuda.is_available()
    return SampleEncoder(
        transform=transform,
        tokenizer=parts.tokenizer,
        colours_later=train and on_gpu,
        hard_captions=config.data.hard_captions if train else 0,
        contents=train and "contents" in parts.objective.reads,
        modalities=parts.modalities,
        dialogues=dialogues(parts) if hasattr(parts.model, "dialogue") else None,
    )


def dialogues(parts: Parts) -> DialogueEncoder:
    """How the dialogues of a generative model are written."""
    data, spec = parts.config.data, parts.model.dialogue
    assert isinstance(spec, DialogueSpec)
    return DialogueEncoder(template=data.template, tokenizer=parts.tokenizer, spec=spec, system=data.system)


def stream_spec(config: DictConfig) -> StreamSpec:
    """What the training stream is, whatever reads it."""
    return StreamSpec(
        seed=config.seed,
        global_batch=config.trainer.global_batch,
        num_steps=config.trainer.max_steps,
        shuffle_window=config.data.shuffle_window,
        epoch_end=config.data.epoch_end,
        pure_batches=config.data.pure_batches,
    )


def train_loader(parts: Parts, placement: Placement, jumps: Jumps = ()) -> TrainLoader:
    """The training stream of this rank, and where the run leaves some of it out."""
    config = parts.config
    steps = building.train_steps(
        plain(config.data),
        stream_spec(config),
        encoder(parts, train=True),
        placement.rank,
        placement.world_size,
    )
    return TrainLoader(steps=steps, num_workers=config.data.num_workers, jumps=jumps)


def eval_loader(
    parts: Parts, source: Source, placement: Placement = Placement(rank=0, world_size=1), num_workers: int = 0
) -> EvalLoader:
    """This rank's share of a source as evaluation reads it."""
    return EvalLoader(
        source=source,
        encoder=encoder(parts, train=False),
        batch_size=parts.config.evaluation.batch_size,
        rank=placement.rank,
        world_size=placement.world_size,
        num_workers=num_workers,
    )


def interface(parts: Parts) -> partial[Any]:
    """What evaluators ask of the model: made of a `model` on a `device`, in the precision that it was trained in."""
    autocast = AUTOCAST.get(parts.config.precision.name)
    if hasattr(parts.model, "dialogue"):
        written = dialogues(parts)
        opened = partial(open_picture, dialogue=written.spec, image=parts.image_spec)
        return partial(Answerer, dialogues=written, tokenizer=parts.tokenizer, autocast=autocast, open_picture=opened)
    return partial(Embedder, tokenizer=parts.tokenizer, autocast=autocast)


def embedder(parts: Parts, device: torch.device) -> Embedder:
    """The model on `device`, as evaluators see it. Raises ConfigError where it cannot embed."""
    autocast = AUTOCAST.get(parts.config.precision.name)
    return Embedder(model=parts.model.to(device), tokenizer=parts.tokenizer, device=device, autocast=autocast)


def evaluators(parts: Parts) -> dict[str, Evaluator]:
    """The evaluators of the config. Raises ConfigError for one that asks what the model cannot tell, and for a template
    of dialogues that the tokenizer cannot write."""
    made = {name: make(node) for name, node in parts.config.evaluation.evaluators.items()}
    check_asked(made, interface(parts).func, type(parts.model).__name__)
    return made


def evaluation_suite(parts: Parts, placement: Placement) -> EvaluationSuite:
    """The evaluators of the config over its validation split."""
    data = plain(parts.config.data)
    loader_of = partial(eval_loader, parts, placement=placement)
    return EvaluationSuite(
        evaluators=evaluators(parts),
        loader=loader_of(source=building.eval_source(data)),
        train=building.TrainSplit(data, loader_of),
        tokenizer=parts.tokenizer,
        interface=interface(parts),
    )


def load(directory: Path, *, checkpoint: Path | None = None, config: DictConfig | None = None) -> Parts:
    """A trained run: `checkpoint` or the newest that verifies, with averaged weights where there are any."""
    run = RunDirectory(directory)
    saved = read_config(run.path)
    path = checkpoint or checkpoints.newest(run.checkpoints)
    if path is None:
        raise CheckpointError(
            f"{directory} has no checkpoint yet", remedy="train it first: the same command resumes it"
        )
    parts = network(config if config is not None else saved, load_tokenizer(str(run.tokenizer)))
    weights = origins.trained_weights(path)
    parts.model.load_state_dict(weights["model"])
    parts.objective.load_state_dict(weights["objective"])
    parts.model.eval()
    return parts


def bind_teachers(parts: Parts) -> None:
    """Loads the run that an objective distils from; only training needs it.

    Raises:
        ConfigError: the run is not there, or its model reads other images or other ids of text.
    """
    for objective in parts.objective.modules():
        if isinstance(objective, Distill):
            teacher = load(Path(objective.teacher))
            _check_teacher(parts, teacher, objective.teacher)
            _narrow(teacher.model, objective)
            objective.bind(teacher.model)


def _check_teacher(parts: Parts, teacher: Parts, where: str) -> None:
    own, theirs = parts.image_spec, teacher.image_spec
    probe = ["a photo of a dog", "two cats, one bird", "1234567890"]
    ids = [whose.tokenizer(probe)[0].tolist() for whose in (parts, teacher)]
    if own.size != theirs.size:
        raise ConfigError(
            "the teacher reads images of another size", got=f"{theirs.size} pixels ({where})",
            allowed=f"{own.size}, as the model that is trained", remedy=f"model.vision.image.size={theirs.size}",
        )  # fmt: skip
    if ids[0] != ids[1]:
        raise ConfigError(
            "the teacher has another tokenizer", got=where, allowed="the tokenizer of the model that is trained",
            remedy=f"set model.tokenizer as {where}/config.yaml has it, and train on the same captions",
        )  # fmt: skip


def skeleton(config: DictConfig) -> Parts:
    """Model and objective without memory, to see whether they can be built and what they hold.

    For a tokenizer that is still to be trained stands one that has seen no text, with the vocabulary asked for.
    """
    tokenizer: Any = origins.tokenizer(config) or make(config.model.tokenizer)
    if _waits(tokenizer):
        asked = {"vocab_size": 8192, "context_length": 32, **tokenizer.keywords}
        asked.pop("special_tokens", None)  # the vocabulary has room for them
        tokenizer = SimpleNamespace(spec=TextSpec(pad_id=0, bos_id=1, eos_id=2, **asked), inner=inner_of(tokenizer([])))
    return network(config, tokenizer, with_values=False)


def make(node: Any, runtime: Mapping[str, Any] | None = None) -> Any:
    """The part that `node` describes, with the runtime values that no config holds; a `_partial_` stays one.

    hydra's wrapper is taken off our own errors: users read those.
    """
    try:
        factory = instantiate(node, _partial_=True, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, VlmError):
            cause = cause.__cause__ or cause.__context__
        raise (cause or error) from None
    return factory if node.get("_partial_") else factory(**(runtime or {}))
