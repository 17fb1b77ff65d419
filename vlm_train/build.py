"""The composition root: the only caller of hydra's instantiate, in the order of a sample's road.

`prepare` makes what every rank will read (manifests, tokenizer). `train` is what each rank runs. `load` brings back a
trained run for evaluation, search and export. Everything else receives finished parts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vlm_train.data import building
from vlm_train.data.collate import SampleEncoder
from vlm_train.data.gallery import ShardGallery
from vlm_train.data.indexing import Progress
from vlm_train.data.pipeline import EvalLoader, TrainLoader
from vlm_train.data.steps import StreamSpec
from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.data.transforms import EvalTransform, TrainTransform
from vlm_train.engine import checkpoints, states
from vlm_train.engine.callbacks.checkpoint import Checkpoint
from vlm_train.engine.callbacks.data_errors import DataErrors, record_left_out
from vlm_train.engine.callbacks.evaluate import Evaluate
from vlm_train.engine.callbacks.pictures import Pictures
from vlm_train.engine.callbacks.recorder import Recorder, StepEnd
from vlm_train.engine.evaluation import EvaluationSuite
from vlm_train.engine.module import TrainingModule, Transforms
from vlm_train.engine.report import write_report
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.steps import StepPlan
from vlm_train.engine.trainer import AUTOCAST, lightning_trainer, set_up_torch
from vlm_train.engine.wandb import WandbSink
from vlm_train.errors import CheckpointError, ConfigError, VlmError
from vlm_train.locations import in_texts, scrubbed
from vlm_train.log import get_logger
from vlm_train.objectives.base import Objective, check_outputs
from vlm_train.types import ImageSpec, Tokenizer

LOG = get_logger(__name__)


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
    def image_spec(self) -> ImageSpec:
        """What the image tower wants to be fed."""
        spec = self.model.image_spec
        assert isinstance(spec, ImageSpec)
        return spec


def prepare(config: DictConfig, run: RunDirectory, *, fresh: bool, progress: Progress) -> None:
    """Indexes the shards and, for a `fresh` run, trains or copies the tokenizer; once, before any rank starts."""
    data = _plain(config.data)
    for split in ("train", "val"):
        found = list(building.manifests(data, split, progress))
        errors = [error for manifest in found for error in manifest.errors()]
        num_samples = sum(map(len, found))
        record_left_out(run if fresh else None, split, errors, num_samples, max_error_rate=config.data.max_error_rate)
    if not fresh:
        return
    tokenizer = make(config.model.tokenizer)
    if callable(getattr(tokenizer, "func", None)):  # a tokenizer that is trained: a partial that waits for captions
        tokenizer = tokenizer(building.train_captions(data))
    tokenizer.save(str(run.tokenizer))


def network(config: DictConfig, tokenizer: Tokenizer) -> Parts:
    """Model and objective, initialised from the seed; keys that do not fit each other are refused here."""
    torch.manual_seed(config.seed)
    node = {key: value for key, value in config.model.items() if key not in ("text", "tokenizer")}
    text = make(config.model.text, {"spec": tokenizer.spec})
    model = make(node, {"text": text})
    objective = make(config.objective)
    check_outputs(objective, model.outputs)
    return Parts(config=config, tokenizer=tokenizer, model=model, objective=objective)


def encoder(config: DictConfig, spec: ImageSpec, tokenizer: Tokenizer, *, train: bool) -> SampleEncoder:
    """Bytes to tensors: augmented for training, deterministic for evaluation."""
    augment = config.data.augment
    transform = TrainTransform(spec=spec, **_plain(augment)) if train else EvalTransform(spec=spec)
    on_gpu = config.trainer.accelerator in ("gpu", "auto") and torch.cuda.is_available()
    return SampleEncoder(
        transform=transform,
        tokenizer=tokenizer,
        colours_later=train and on_gpu,
        hard_captions=config.data.hard_captions if train else 0,
        contents=train and config.objective.get("partners") == "content",
    )


def train_loader(parts: Parts, placement: Placement) -> TrainLoader:
    """The training stream of this rank."""
    config = parts.config
    stream = StreamSpec(
        seed=config.seed,
        global_batch=config.trainer.global_batch,
        num_steps=config.trainer.max_steps,
        shuffle_window=config.data.shuffle_window,
        epoch_end=config.data.epoch_end,
    )
    steps = building.train_steps(
        _plain(config.data),
        stream,
        encoder(config, parts.image_spec, parts.tokenizer, train=True),
        placement.rank,
        placement.world_size,
    )
    return TrainLoader(steps=steps, num_workers=config.data.num_workers)


def evaluation_suite(parts: Parts, placement: Placement) -> EvaluationSuite:
    """The evaluators of the config over its validation split."""
    config = parts.config
    loader = EvalLoader(
        source=building.eval_source(_plain(config.data)),
        encoder=encoder(config, parts.image_spec, parts.tokenizer, train=False),
        batch_size=config.evaluation.batch_size,
        rank=placement.rank,
        world_size=placement.world_size,
        num_workers=0,
    )
    evaluators = {name: make(node) for name, node in config.evaluation.evaluators.items()}
    return EvaluationSuite(
        evaluators=evaluators, loader=loader, tokenizer=parts.tokenizer, autocast=AUTOCAST.get(config.precision.name)
    )


def train(directory: Path, checkpoint: Path | None) -> None:
    """What each rank runs: from the config in `directory`, or from `checkpoint`, to the last step."""
    run = RunDirectory(directory)
    config = OmegaConf.load(run.config)
    assert isinstance(config, DictConfig)
    placement = Placement.from_environment()
    set_up_torch(
        accelerator=config.trainer.accelerator,
        deterministic=config.trainer.deterministic,
        num_threads=config.trainer.num_threads,
    )
    parts = network(config, load_tokenizer(str(run.tokenizer)))
    loader = train_loader(parts, placement)
    suite = evaluation_suite(parts, placement)
    module = training_module(parts, placement)
    sinks = [_wandb(config, run)] if config.logger.name == "wandb" and placement.rank == 0 else []
    trainer = make_trainer(config, callbacks(parts, run, loader, suite, sinks))
    if checkpoint is None or checkpoints.step_of(checkpoint) < config.trainer.max_steps:
        path = str(checkpoint / checkpoints.STATE) if checkpoint else None
        trainer.fit(module, train_dataloaders=loader, ckpt_path=path, weights_only=True)
    for sink in sinks:
        sink.close()
    if placement.rank == 0:
        run.event("finished", {"step": config.trainer.max_steps})
        write_report(run)


def training_module(parts: Parts, placement: Placement) -> TrainingModule:
    """The LightningModule around a model and its objective."""
    config = parts.config
    plan = StepPlan(
        global_batch=config.trainer.global_batch,
        micro_batch=config.trainer.micro_batch,
        rank=placement.rank,
        world_size=placement.world_size,
        seed=config.seed,
    )
    if config.precision.name == "fp64":  # before Lightning converts them, which it does after it has read a checkpoint
        parts.model.double()
        parts.objective.double()
    return TrainingModule(
        model=parts.model,
        objective=parts.objective,
        optim=make(config.optim),
        schedule=make(config.schedule),
        plan=plan,
        transforms=Transforms(recompute=config.strategy.recompute, compile=config.compile.enabled),
    )


def callbacks(
    parts: Parts, run: RunDirectory, loader: TrainLoader, suite: EvaluationSuite, sinks: list[Any]
) -> list[lightning.Callback]:
    """In the order in which they act after a step: record, judge the data, measure, draw, save."""
    config = parts.config
    num_steps, global_batch = config.trainer.max_steps, config.trainer.global_batch
    every_steps, keep = config.checkpoint.every_steps, config.checkpoint.keep
    gallery = ShardGallery(shards=_plain(config.data.val.shards)).pixels
    recorder = Recorder(run=run, global_batch=global_batch, num_steps=num_steps, sinks=sinks)
    return [
        recorder,
        DataErrors(
            run=run,
            global_batch=global_batch,
            max_error_rate=config.data.max_error_rate,
            samples_per_epoch=loader.samples_per_epoch,
        ),
        Evaluate(run=run, suite=suite, every_steps=config.evaluation.every_steps, num_steps=num_steps),
        Pictures(run=run, suite=suite, image=parts.image_spec, gallery=gallery),
        Checkpoint(run=run, every_steps=every_steps, keep=keep, num_steps=num_steps),
        StepEnd(recorder),
    ]


def make_trainer(config: DictConfig, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    """The Trainer for this machine."""
    return lightning_trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=config.strategy.name,
        precision=config.precision.name,
        callbacks=callbacks,
    )


def load(directory: Path, *, checkpoint: Path | None = None, config: DictConfig | None = None) -> Parts:
    """A trained run: `checkpoint` or the newest that verifies, with averaged weights where there are any."""
    run = RunDirectory(directory)
    if not run.config.is_file():
        raise ConfigError(f"{directory} is no run: it has no config.yaml", remedy="run=runs/<experiment>/latest")
    saved = OmegaConf.load(run.config)
    assert isinstance(saved, DictConfig)
    path = checkpoint or checkpoints.newest(run.checkpoints)
    if path is None:
        raise CheckpointError(
            f"{directory} has no checkpoint yet", remedy="train it first: the same command resumes it"
        )
    parts = network(config if config is not None else saved, load_tokenizer(str(run.tokenizer)))
    state = states.read_weights(path)
    prefix = "averaged_model." if any(key.startswith("averaged_model.") for key in state) else "model."
    parts.model.load_state_dict(_under(state, prefix))
    parts.objective.load_state_dict(_under(state, "objective."))
    parts.model.eval()
    return parts


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


def _under(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _wandb(config: DictConfig, run: RunDirectory) -> WandbSink:
    resolved = in_texts(scrubbed, OmegaConf.to_container(config, resolve=True))
    return WandbSink(
        project=config.logger.project,
        entity=config.logger.entity,
        mode=config.logger.mode,
        run_id=config.run.id,
        directory=run.path,
        config=resolved,
    )
