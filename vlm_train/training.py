"""What each rank runs: the parts of `build.py` in Lightning's loop, from the config of a run to its last step."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning

from vlm_train import __version__, build, origins
from vlm_train.build import Parts, Placement
from vlm_train.data.gallery import ShardGallery
from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.distributed import collectives
from vlm_train.engine import checkpoints, rehearsal, sharding, wandb
from vlm_train.engine.callbacks.checkpoint import Checkpoint
from vlm_train.engine.callbacks.clock import Border, Clock
from vlm_train.engine.callbacks.data_errors import DataErrors
from vlm_train.engine.callbacks.evaluate import Evaluate
from vlm_train.engine.callbacks.micro_batch import MicroBatch
from vlm_train.engine.callbacks.pictures import Pictures
from vlm_train.engine.callbacks.recorder import Recorder, StepEnd
from vlm_train.engine.callbacks.spikes import Spikes
from vlm_train.engine.copies import Copies, Store
from vlm_train.engine.evaluation import EvaluationSuite
from vlm_train.engine.ledger import Ledger, kept
from vlm_train.engine.micro_batches import AUTO, Budgets, even_sizes
from vlm_train.engine.module import TrainingModule, Transforms
from vlm_train.engine.report import write_report
from vlm_train.engine.rewinds import Spike, go_back, jumps_of
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.saving import Saver
from vlm_train.engine.steps import StepPlan
from vlm_train.engine.stops import Interrupted
from vlm_train.engine.trainer import lightning_trainer, set_up_torch
from vlm_train.engine.watchdog import watched
from vlm_train.errors import VlmError
from vlm_train.locations import in_texts, scrubbed
from vlm_train.log import get_logger
from vlm_train.models.feature_store import FeatureStore, reason_against
from vlm_train.models.generative import GenerativeModel
from vlm_train.schema import plain, read_config
from vlm_train.types import Jumps

LOG = get_logger(__name__)


def train(directory: Path, checkpoint: Path | None) -> None:
    """What each rank runs: from the config in `directory`, or from `checkpoint`, to the last step."""
    run = RunDirectory(directory)
    config = read_config(run.path)
    placement = Placement.from_environment()
    set_up_torch(
        accelerator=config.trainer.accelerator,
        deterministic=config.trainer.deterministic,
        num_threads=config.trainer.num_threads,
    )
    with (
        _failure_recorded(run, placement.rank),
        kept(run, placement.rank) as ledger,
        watched(run, config, placement.world_size),
    ):
        taken, rules = run.rewinds(), config.spikes
        first = _micro_batch(config, run, placement, ledger)
        while (spike := _fit(config, run, placement, checkpoint, jumps_of(taken), ledger, first)) is not None:
            ledger.switch("replay")  # until the spike is reached again
            gc.collect()  # trainer and model know each other; two models at once may not fit
            row, checkpoint = go_back(run, spike, taken, rewind_steps=rules.rewind_steps, max_rewinds=rules.max_rewinds)
            taken.append(row)
        if placement.rank == 0:
            run.event("finished", {"step": config.trainer.max_steps})
            ledger.write("running")
            write_report(run)
            if config.logger.name == "wandb" and config.logger.mode == "offline":
                wandb.replay(run, _wandb(config, run))


@contextmanager
def _failure_recorded(run: RunDirectory, rank: int) -> Iterator[None]:
    """An error that ends the run is an event of it, `failed`; a run that was asked to stop has not failed."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        if rank == 0:
            what = error.what if isinstance(error, VlmError) else f"{type(error).__name__}: {error}"
            with suppress(VlmError):  # the disk may be full, of which the error tells
                run.event("failed", {"step": run.last_step(), "error": scrubbed(what.splitlines()[0][:500])})
        raise


def _micro_batch(config: Any, run: RunDirectory, placement: Placement, ledger: Ledger) -> list[lightning.Callback]:
    """What sets the micro-batch before the first step, where the config leaves that to the machine."""
    if config.trainer.micro_batch != AUTO:
        return []
    sizes = even_sizes(config.trainer.global_batch, placement.world_size)
    command = [sys.executable, "-m", "vlm_train.cli.rehearse", str(run.path)]
    alive = lambda: ledger.switch("startup")  # noqa: E731
    return [MicroBatch(run, rehearsal.answer(run, config, sizes, placement.world_size, command, alive))]


def _fit(
    config: Any,
    run: RunDirectory,
    placement: Placement,
    checkpoint: Path | None,
    jumps: Jumps,
    ledger: Ledger,
    first: list[lightning.Callback],
) -> Spike | None:
    """From `checkpoint` to the last step, or to a spike, which is returned. `first`: callbacks before all others."""
    with_values = sharding.is_built_by(placement.rank, config.strategy.name)
    parts = build.network(config, load_tokenizer(str(run.tokenizer)), with_values=with_values)
    if checkpoint is None:
        origins.start_as_told(parts)
    build.bind_teachers(parts)
    loader = build.train_loader(parts, placement, jumps)
    suite = build.evaluation_suite(parts, placement)
    module = training_module(parts, placement, ledger)
    keep_features(parts)
    is_mirrored = config.logger.name == "wandb" and config.logger.mode == "online" and placement.rank == 0
    sinks = [wandb.WandbSink(run, _wandb(config, run))] if is_mirrored else []
    others = callbacks(parts, run, loader, suite, sinks, ledger)
    trainer = make_trainer(config, [*first, *others], trains_a_part=trains_a_part(parts))
    spike = None
    if checkpoint is None or checkpoints.step_of(checkpoint) < config.trainer.max_steps:
        path = str(checkpoint / checkpoints.STATE) if checkpoint else None
        try:
            trainer.fit(module, train_dataloaders=loader, ckpt_path=path, weights_only=True)
        except Spike as raised:
            spike = raised.with_traceback(None)  # which would keep the model
    store: FeatureStore | None = getattr(parts.model, "feature_store", None)
    if store is not None:
        LOG.info("%d pictures were read from the feature store, %d were computed", store.num_read, store.num_computed)
    for sink in sinks:
        sink.close()
    return spike


def training_module(parts: Parts, placement: Placement, ledger: Ledger | None = None) -> TrainingModule:
    """The LightningModule around a model and its objective."""
    config = parts.config
    budgets = Budgets.of(config.trainer)
    if budgets.weighs_dialogues:
        budgets.check(parts.model.dialogue)  # type: ignore[arg-type]
    plan = StepPlan(
        global_batch=config.trainer.global_batch,
        budgets=budgets,
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
        optim=build.make(config.optim),
        schedule=build.make(config.schedule),
        plan=plan,
        transforms=Transforms(
            attention=config.attention.name, recompute=config.strategy.recompute, compile=config.compile.enabled
        ),
        ledger=ledger,
    )


def keep_features(parts: Parts) -> None:
    """Gives the model the store of `strategy.feature_store`, or says why it has no use for one; once it is known what
    is frozen."""
    config, model = parts.config, parts.model
    if config.strategy.feature_store is None:
        return
    if (reason := _reason_against_store(parts)) is not None:
        LOG.info("strategy.feature_store is not used: %s", reason)
        return
    settings = {
        "tower": [plain(config.model.vision), model.feature_layer],
        "arithmetic": [config.precision.name, config.attention.name, config.compile.enabled],
        "vlm_train": __version__,
    }
    model.feature_store = FeatureStore(  # type: ignore[assignment]
        folder=Path(config.strategy.feature_store),
        limit=int(config.strategy.feature_store_gb * 1e9),
        tower=model.vision,  # type: ignore[arg-type]
        settings=json.dumps(settings, sort_keys=True),
        any_rank=collectives.all_reduce_max,
    )


def _reason_against_store(parts: Parts) -> str | None:
    augment = parts.config.data.augment
    if not isinstance(parts.model, GenerativeModel):
        return f"a {type(parts.model).__name__} does not read the tokens of an image tower"
    if augment.scale is not None or augment.flip or augment.color_jitter or augment.grayscale:
        return (
            "data.augment makes another picture each time; data.augment.scale=null, and flip, color_jitter and "
            "grayscale of 0, do not"
        )
    return reason_against(parts.model.vision)  # type: ignore[arg-type]


def callbacks(
    parts: Parts,
    run: RunDirectory,
    loader: TrainLoader,
    suite: EvaluationSuite,
    sinks: list[Any],
    ledger: Ledger,
) -> list[lightning.Callback]:
    """In the order in which they act after a step: judge it, record, judge the data, measure, draw, save."""
    config = parts.config
    num_steps, global_batch = config.trainer.max_steps, config.trainer.global_batch
    every_steps, spikes = config.checkpoint.every_steps, config.spikes
    keep = max(config.checkpoint.keep, 1 + -(-spikes.rewind_steps // every_steps))  # one to go back to
    gallery = ShardGallery(shards=plain(config.data.val.shards)).pixels
    recorder = Recorder(run=run, global_batch=global_batch, num_steps=num_steps, sinks=sinks, ledger=ledger)
    suite.moved = lambda: ledger.switch(ledger.account)
    return [
        Spikes(run=run, threshold=spikes.threshold, window=spikes.window),
        recorder,
        DataErrors(
            run=run,
            global_batch=global_batch,
            max_error_rate=config.data.max_error_rate,
            samples_per_epoch=loader.samples_per_epoch,
        ),
        Border(ledger, "validation"),
        Evaluate(run=run, suite=suite, every_steps=config.evaluation.every_steps, num_steps=num_steps),
        Pictures(run=run, suite=suite, image=parts.image_spec, gallery=gallery),
        Border(ledger, "checkpoint"),
        Checkpoint(run=run, saver=_saver(config, run, keep), every_steps=every_steps, num_steps=num_steps),
        StepEnd(recorder),
        Clock(ledger),
    ]


def _saver(config: Any, run: RunDirectory, keep: int) -> Saver:
    settings = config.checkpoint
    stay: dict[str, Any] = {"run": run, "keep": keep, "keep_every_steps": settings.keep_every_steps}
    copies = Copies(store=Store(settings.copy_to, config.run.id), **stay) if settings.copy_to else None
    return Saver(asynchronous=settings.asynchronous, copies=copies, **stay)


def trains_a_part(parts: Parts) -> bool:
    """Whether the objective leaves some of what the model returns unread."""
    return not parts.objective.requires.issuperset(parts.model.outputs)  # type: ignore[arg-type]


def make_trainer(config: Any, callbacks: list[lightning.Callback], *, trains_a_part: bool = False) -> lightning.Trainer:
    """The Trainer for this machine; `trains_a_part`: see `lightning_trainer`."""
    return lightning_trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=config.strategy.name,
        precision=config.precision.name,
        callbacks=callbacks,
        trains_a_part=trains_a_part,
    )


def _wandb(config: Any, run: RunDirectory) -> Any:
    """The W&B run of a run."""
    return wandb.begin(
        run,
        project=config.logger.project,
        entity=config.logger.entity,
        mode=config.logger.mode,
        run_id=config.run.id,
        config=in_texts(scrubbed, plain(config)),
    )
