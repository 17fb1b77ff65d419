"""The composition root: the only caller of hydra's instantiate, in the order of a sample's road.

`prepare` makes what every rank will read (manifests, tokenizer). `train` is what each rank runs. `load` brings back a
trained run for evaluation, search and export. Everything else receives finished parts.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vlm_train.data.captions import iter_captions
from vlm_train.data.gallery import ShardGallery
from vlm_train.data.manifest import open_manifest
from vlm_train.data.patterns import expand_shards
from vlm_train.data.pipeline import EvalLoader, SampleEncoder, StreamSpec, TrainLoader
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.data.transforms import EvalTransform, TrainTransform
from vlm_train.engine import checkpoints
from vlm_train.engine.callbacks.checkpoint import Checkpoint
from vlm_train.engine.callbacks.evaluate import Evaluate
from vlm_train.engine.callbacks.pictures import Pictures
from vlm_train.engine.callbacks.recorder import Recorder, StepEnd
from vlm_train.engine.evaluation import EvaluationSuite
from vlm_train.engine.module import TrainingModule
from vlm_train.engine.report import write_report
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.steps import StepPlan
from vlm_train.engine.wandb import WandbSink
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.log import get_logger
from vlm_train.objectives.base import Objective, check_outputs
from vlm_train.types import ImageSpec, Tokenizer

LOG = get_logger(__name__)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp64": "64-true"}


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


def prepare(config: DictConfig, run: RunDirectory, *, fresh: bool, progress: Callable[[str], None]) -> None:
    """Indexes the shards and, for a `fresh` run, trains or copies the tokenizer; once, before any rank starts."""
    open_manifest(_plain(config.data.train.shards), progress=progress)
    open_manifest(_plain(config.data.val.shards), progress=progress)
    if not fresh:
        return
    tokenizer = instantiate(config.model.tokenizer)
    if callable(getattr(tokenizer, "func", None)):  # a tokenizer that is trained: a partial that waits for captions
        tokenizer = tokenizer(iter_captions(expand_shards(_plain(config.data.train.shards))))
    tokenizer.save(str(run.tokenizer))


def network(config: DictConfig, tokenizer: Tokenizer) -> Parts:
    """Model and objective, initialised from the seed; keys that do not fit each other are refused here."""
    torch.manual_seed(config.seed)
    node = {key: value for key, value in config.model.items() if key not in ("text", "tokenizer")}
    text = instantiate(config.model.text, spec=tokenizer.spec)
    model = instantiate(node, text=text)
    objective = instantiate(config.objective)
    check_outputs(objective, model.outputs)
    return Parts(config=config, tokenizer=tokenizer, model=model, objective=objective)


def encoder(config: DictConfig, spec: ImageSpec, tokenizer: Tokenizer, *, train: bool) -> SampleEncoder:
    """Bytes to tensors: augmented for training, deterministic for evaluation."""
    augment = config.data.augment
    transform = (
        TrainTransform(spec=spec, scale=tuple(augment.scale), ratio=tuple(augment.ratio), flip=augment.flip)
        if train
        else EvalTransform(spec=spec)
    )
    return SampleEncoder(transform=transform, tokenizer=tokenizer)


def train_loader(parts: Parts, placement: Placement) -> TrainLoader:
    """The training stream of this rank."""
    config = parts.config
    source = ShardSource(shards=_plain(config.data.train.shards))
    selection = (
        Selection.load(Path(config.data.selection), source.fingerprint)
        if config.data.selection
        else Selection.all(len(source))
    )
    stream = StreamSpec(
        seed=config.seed,
        global_batch=config.trainer.global_batch,
        num_steps=config.trainer.max_steps,
        shuffle_window=config.data.shuffle_window,
        epoch_end=config.data.epoch_end,
    )
    return TrainLoader(
        source=source,
        selection=selection,
        stream=stream,
        encoder=encoder(config, parts.image_spec, parts.tokenizer, train=True),
        rank=placement.rank,
        world_size=placement.world_size,
        num_workers=config.data.num_workers,
        max_error_rate=config.data.max_error_rate,
    )


def evaluation_suite(parts: Parts, placement: Placement) -> EvaluationSuite:
    """The evaluators of the config over its validation split."""
    config = parts.config
    loader = EvalLoader(
        source=ShardSource(shards=_plain(config.data.val.shards)),
        encoder=encoder(config, parts.image_spec, parts.tokenizer, train=False),
        batch_size=config.evaluation.batch_size,
        rank=placement.rank,
        world_size=placement.world_size,
        num_workers=0,
    )
    evaluators = {name: instantiate(node) for name, node in config.evaluation.evaluators.items()}
    return EvaluationSuite(
        evaluators=evaluators, loader=loader, tokenizer=parts.tokenizer, autocast=AUTOCAST.get(config.precision.name)
    )


def train(directory: Path, checkpoint: Path | None) -> None:
    """What each rank runs: from the resolved config in `directory` to the last step. Resumes at `checkpoint` if given."""
    run = RunDirectory(directory)
    config = OmegaConf.load(run.config)
    assert isinstance(config, DictConfig)
    placement = Placement.from_environment()
    _set_up_torch(config, placement)
    parts = network(config, load_tokenizer(str(run.tokenizer)))
    loader = train_loader(parts, placement)
    suite = evaluation_suite(parts, placement)
    module = training_module(parts, placement)
    sinks = [_wandb(config, run)] if config.logger.name == "wandb" and placement.rank == 0 else []
    trainer = lightning_trainer(config, placement, callbacks(parts, run, suite, sinks))
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
    return TrainingModule(
        model=parts.model,
        objective=parts.objective,
        optim=instantiate(config.optim, _convert_="all"),
        schedule=instantiate(config.schedule),
        plan=plan,
        compile_blocks=config.compile.enabled,
    )


def callbacks(parts: Parts, run: RunDirectory, suite: EvaluationSuite, sinks: list[Any]) -> list[lightning.Callback]:
    """In the order in which they act after a step: record, measure, draw, save."""
    config = parts.config
    num_steps = config.trainer.max_steps
    every_steps, keep = config.checkpoint.every_steps, config.checkpoint.keep
    gallery = ShardGallery(shards=_plain(config.data.val.shards)).pixels
    recorder = Recorder(run=run, global_batch=config.trainer.global_batch, num_steps=num_steps, sinks=sinks)
    return [
        recorder,
        Evaluate(run=run, suite=suite, every_steps=config.evaluation.every_steps, num_steps=num_steps),
        Pictures(run=run, suite=suite, image=parts.image_spec, gallery=gallery),
        Checkpoint(run=run, every_steps=every_steps, keep=keep, num_steps=num_steps),
        StepEnd(recorder),
    ]


def lightning_trainer(
    config: DictConfig, placement: Placement, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    """A Trainer that only drives: logging, checkpoints and progress are ours."""
    distributed = placement.world_size > 1 or config.strategy.name == "ddp"
    environment = TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()
    return lightning.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy="ddp" if distributed else "auto",
        precision=PRECISION[config.precision.name],
        plugins=[environment],
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=None,
    )


def load(directory: Path, *, checkpoint: Path | None = None, config: DictConfig | None = None) -> Parts:
    """A trained run: its newest checkpoint that verifies (or the one given), with averaged weights where there are any."""
    run = RunDirectory(directory)
    if not run.config.is_file():
        raise ConfigError(
            f"{directory} is no run directory: it has no config.yaml", remedy="run=runs/<experiment>/latest"
        )
    saved = OmegaConf.load(run.config)
    assert isinstance(saved, DictConfig)
    path = checkpoint or checkpoints.newest(run.checkpoints)
    if path is None:
        raise CheckpointError(
            f"{directory} has no checkpoint yet", remedy="train it first: the same command resumes it"
        )
    parts = network(config if config is not None else saved, load_tokenizer(str(run.tokenizer)))
    state = torch.load(path / checkpoints.STATE, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    prefix = "averaged_model." if any(key.startswith("averaged_model.") for key in state) else "model."
    parts.model.load_state_dict(_under(state, prefix))
    parts.objective.load_state_dict(_under(state, "objective."))
    parts.model.eval()
    return parts


def _under(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _wandb(config: DictConfig, run: RunDirectory) -> WandbSink:
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    return WandbSink(
        project=config.logger.project,
        entity=config.logger.entity,
        mode=config.logger.mode,
        run_id=config.run.id,
        directory=run.path,
        config=resolved,
    )


def _set_up_torch(config: DictConfig, placement: Placement) -> None:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", placement.world_size))
    torch.set_num_threads(config.trainer.num_threads or max(len(os.sched_getaffinity(0)) // local_ranks, 1))
    on_cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    deterministic = config.trainer.deterministic if config.trainer.deterministic is not None else on_cpu
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # advice about worker counts and logging that does not apply to this loader
    warnings.filterwarnings("ignore", module="lightning.*")
