"""What a rank holds, by the strategy that shares it out.

Weights, gradients, optimizer state and the moving average are exact. Under FSDP2 each tensor is cut along its first
dimension into equal numbers of rows, the last ranks holding fewer or none; the rank told of is the first, which holds
most. What is gathered while a block computes, activations and loss are added where they can exist at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from vlm_train.engine import sharding
from vlm_train.plan.dry import DryRun, bytes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Bytes that the first rank holds from step to step. `exchange`: copies of gradients that DistributedDataParallel
    sends; `gathered`: what FSDP2 puts together while it computes."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    exchange: int
    gathered: int

    @property
    def total(self) -> int:
        """Of all of them."""
        return self.weights + self.gradients + self.optimizer + self.average + self.exchange + self.gathered


def local_bytes(tensor: Tensor, rank: int, world_size: int) -> int:
    """What rank `rank` of `world_size` holds of a tensor that is sharded as `fully_shard` does it."""
    rows = -(-tensor.shape[0] // world_size)
    mine = min(rows, max(0, tensor.shape[0] - rank * rows))
    return mine * (tensor.nbytes // max(1, tensor.shape[0]))


def holdings(dry: DryRun, strategy: str, world_size: int, num_micro_batches: int, rank: int = 0) -> Holdings:
    """What a rank holds of a run; `num_micro_batches`: K, of a step."""
    is_sharded = strategy == "fsdp2"
    model: set[Tensor] = set(dry.parts.model.parameters())

    def held(tensors: Collection[tuple[Tensor, Tensor]]) -> int:
        """(parameter, what has its shape or is a number of it): whole, or the rank's share."""
        whole = [t for p, t in tensors if not (is_sharded and p in model and t.shape == p.shape)]
        return bytes_of(whole) + sum(
            local_bytes(t, rank, world_size) for p, t in tensors if is_sharded and p in model and t.shape == p.shape
        )

    parameters = list(dry.learner.parameters())
    learning = dry.learning()
    average = [] if dry.average is None else list(dry.average.parameters())
    buffers = bytes_of(dry.learner.buffers())
    of_teacher = 0 if dry.teacher is None else bytes_of([*dry.teacher.parameters(), *dry.teacher.buffers()])
    share = (lambda tensors: sum(local_bytes(t, rank, world_size) for t in tensors)) if is_sharded else bytes_of
    return Holdings(
        weights=held([(p, p) for p in parameters]) + buffers + of_teacher,
        gradients=held([(p, p) for p in learning]),
        optimizer=held(dry.optimizer_tensors()),
        average=share(average) + (bytes_of(dry.average.buffers()) if dry.average is not None else 0),
        exchange=bytes_of(p for p in parameters if p.requires_grad) if strategy == "ddp" else 0,
        gathered=_gathered(dry.parts.model, num_micro_batches) if is_sharded else 0,
    )


def _gathered(model: nn.Module, num_micro_batches: int) -> int:
    """What FSDP2 holds whole at once: what stands outside the blocks, two blocks (one computes, the next arrives), and
    the gradients of these; of all that learns where the gradients of several micro-batches are added up before they
    are reduced."""
    blocks = [list(block.parameters()) for block in sharding.blocks_of(model)]
    inside = {parameter for block in blocks for parameter in block}
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    learning = [[p for p in block if p.requires_grad] for block in blocks]
    values = bytes_of(outside) + 2 * max(map(bytes_of, blocks), default=0)
    if num_micro_batches > 1:
        return values + bytes_of(p for p in model.parameters() if p.requires_grad)
    own = bytes_of(p for p in outside if p.requires_grad)
    return values + own + 2 * max(map(bytes_of, learning), default=0)


def checkpoint_bytes(dry: DryRun) -> int:
    """Tensors of a checkpoint: weights, moving average, and the optimizer's state, whole."""
    modules = [dry.learner, *([dry.average] if dry.average is not None else [])]
    weights = sum(bytes_of(module.state_dict(keep_vars=True).values()) for module in modules)
    return weights + bytes_of(state for _, state in dry.optimizer_tensors())
