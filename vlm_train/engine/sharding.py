"""FSDP2: every rank keeps a slice of each parameter and of its optimizer state, and gathers a block while it computes.

Order of the transforms, which must not change: activation checkpointing per block, compilation per block, sharding per
block and then of the rest. All of them act in place, so the names of parameters stay those of the plain model, and a
checkpoint of one strategy is a checkpoint of every other.

Only rank 0 builds the model with its values; the others build its shapes on the meta device, and get their slices of
what rank 0 has. So the first weights are those of a single process, and a host's memory holds the model once.

The model is sharded, the objective is not: a temperature has nothing to shard and must stay out of every cast. Its
gradient is averaged over ranks by `average_unsharded`, as the reduction of FSDP2 averages the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vlm_train.distributed import collectives


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of the block lists that towers keep as `blocks`."""
    for module in model.modules():
        yield from getattr(module, "blocks", None) or []


def is_built_by(rank: int, strategy: str) -> bool:
    """Whether this rank builds the values of the model, or its shapes alone."""
    return rank == 0 or strategy != "fsdp2"


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards every block, then the rest of the model, over the ranks of `mesh`. In place. The values are rank 0's;
    those of other ranks may be on the meta device. Collective."""
    values = model.state_dict() if collectives.rank() == 0 else {}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in getattr(model, "forward_methods", ()):
        register_fsdp_forward_method(model, name)
    _distribute(model, values, torch.device(mesh.device_type))


@torch.no_grad()
def _distribute(model: nn.Module, values: dict[str, Any], device: torch.device) -> None:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, values, options=options)
    for buffer in model.buffers():  # also those that are in no state
        buffer.copy_(collectives.broadcast(buffer))


def reduce_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass of a sharded model reduces gradients over ranks, or adds them up on this one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


@torch.no_grad()
def average_unsharded(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of parameters that every rank holds whole become their mean over ranks. Collective."""
    for parameter in parameters:
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = collectives.all_reduce_sum(grad) / collectives.world_size()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all parameters and a forward pass exchanges nothing: ranks may run unequal numbers of
    batches, as evaluation does."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def parted(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sharded and whole tensors apart: torch's fused kernels take no mixture."""
    parts = ([x for x in tensors if isinstance(x, DTensor) is sharded] for sharded in (True, False))
    return [part for part in parts if part]


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each of n tensors, [n], equal on every rank. Collective where one of them is sharded: one exchange
    of n numbers."""
    found = torch.stack(list(torch._foreach_norm(local(tensors))))
    sharded = [isinstance(tensor, DTensor) for tensor in tensors]
    if not any(sharded):
        return found
    squares = found.double().square()
    is_sharded = torch.tensor(sharded, device=found.device)
    return torch.where(is_sharded, collectives.all_reduce_sum(squares), squares).sqrt().to(found.dtype)
