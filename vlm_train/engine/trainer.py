"""What Lightning and torch are told before a run: the only place that knows their words for our choices."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, Strategy

from vlm_train.engine.strategies import AnyCheckpoint, Sharded

PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp64": "64-true"}


def set_up_torch(*, accelerator: str, deterministic: bool | None, num_threads: int | None) -> None:
    """Threads of this rank (cores / local ranks unless given) and determinism (on CPU unless given)."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_threads or max(len(os.sched_getaffinity(0)) // local_ranks, 1))
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    deterministic = on_cpu if deterministic is None else deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # advice about worker counts and logging that does not apply to this loader
    warnings.filterwarnings("ignore", module="lightning.*")


def _strategy(name: str, world_size: int, *, trains_a_part: bool) -> Strategy | str:
    if name == "fsdp2":
        return Sharded(world_size)
    return DDPStrategy(find_unused_parameters=trains_a_part) if name == "ddp" else "auto"


def lightning_trainer(
    *,
    accelerator: str,
    devices: int,
    num_nodes: int,
    strategy: str,
    precision: str,
    callbacks: list[lightning.Callback],
    trains_a_part: bool = False,
) -> lightning.Trainer:
    """A Trainer that only drives: records, checkpoints, evaluation and progress are our callbacks.

    `trains_a_part`: the objective does not read all that the model returns, so some parameters get no gradient, which
    DDP does not expect unless it is told.

    The whole run is one epoch of the loader, which knows its length, so Lightning prefetches nothing and the loader's
    count of consumed batches is right at every step.
    """
    # Lightning refuses the name of this pair, though the plugin works
    sharded_fp64 = strategy == "fsdp2" and precision == "fp64"
    environment: Any = TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()
    plugins: list[Any] = [environment, DoublePrecision()] if sharded_fp64 else [environment]
    if strategy != "fsdp2":
        plugins.append(AnyCheckpoint())
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=_strategy(strategy, devices * num_nodes, trains_a_part=trains_a_part),
        precision=None if sharded_fp64 else PRECISION[precision],
        plugins=plugins,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    # signals are those of `stops`: Lightning's handler of SIGTERM ends a run without saving it, and first waits for the
    # other ranks in an exchange, which may be gone or in another one
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
