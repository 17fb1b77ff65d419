"""What a plan says of a config, and what the real training module of that config holds and keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_train import build, training
from vlm_train.plan.dry import DryRun, bytes_of, tensors_of
from vlm_train.plan.memory import Holdings, checkpoint_bytes, holdings
from vlm_train.plan.shapes import Live
from vlm_train.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes of a run. `kept`: what autograd holds when the first backward pass begins, once its storages are counted
    one by one; `peak`: the most that was there beside weights and gradients."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    kept: int
    peak: int


class Real:
    """The real module and optimizer of a config, on this processor."""

    def __init__(self, config: Any, *, num_rows: int) -> None:
        config.trainer.global_batch, config.trainer.accelerator = num_rows, "cpu"
        parts = build.network(config, build.skeleton(config).tokenizer)
        self.module = training.training_module(parts, build.Placement(rank=0, world_size=1))
        if config.strategy.recompute:
            from torch.distributed._composable import checkpoint

            from vlm_train.engine.sharding import blocks_of

            for block in blocks_of(parts.model):
                checkpoint(block)
        self.optimizer: Any = self.module.configure_optimizers()
        self.batch = real_batch(DryRun(config, like_a_gpu=False).batch(num_rows))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision.name == "bf16")

    def step(self) -> Measured:
        """One step, and what was there."""
        module, fixed = self.module, self._fixed()
        kept: list[int] = []
        with Live(fixed) as live, saved(fixed) as storages, self.autocast:

            def backward(scalar: Tensor, is_last: bool) -> None:
                if not kept:
                    kept.append(sum(storages.values()))
                scalar.backward()

            module.gradient_step.run(self.batch, 0, backward)
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            peak = live.peak_without(gradients)
        self.optimizer.step()
        average = module.averaged_model
        learner = [*module.model.parameters(), *module.objective.parameters()]
        buffers = [*module.model.buffers(), *module.objective.buffers()]
        return Measured(
            weights=bytes_of(learner) + bytes_of(buffers),
            gradients=bytes_of(gradients),
            optimizer=bytes_of(value for slots in self.optimizer.state.values() for value in slots.values()),
            average=0 if average is None else bytes_of([*average.parameters(), *average.buffers()]),
            kept=kept[0],
            peak=peak,
        )

    def _fixed(self) -> list[Tensor]:
        """What is no activation: parameters, buffers and the batch."""
        return [*self.module.parameters(), *self.module.buffers(), *tensors_of(self.batch)]


@contextmanager
def saved(fixed: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Storage -> bytes of what is saved for backward passes inside, but for those `fixed`."""
    left_out = {tensor.untyped_storage()._cdata for tensor in fixed}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def real_batch(batch: Batch) -> Batch:
    """A batch of shapes with values."""
    fields: Any = dict(batch)
    generator = torch.Generator().manual_seed(0)
    for name, value in fields.items():
        if type(value) is not Tensor:
            low, high = (0, 255) if value.dtype == torch.uint8 else (0, 2)
            whole = torch.randint(low, high, tuple(value.shape), generator=generator)
            fields[name] = whole.to(value.dtype)
    return Batch(**fields)


def held(config: Any) -> tuple[Holdings, int]:
    """What a plan says that one rank holds, and of the checkpoint."""
    dry = DryRun(config, like_a_gpu=False)
    return holdings(dry, "single", 1, 1), checkpoint_bytes(dry)
