"""The few exchanges between ranks that training and evaluation need, as plain functions.

Every function is the identity when `torch.distributed` is not initialised, so callers hold no branch for one process.
Ranks may hold unequal numbers of rows (a global batch that the world size does not divide, padding rows dropped, a last
batch), which `all_gather` alone refuses. `gather_rows` therefore

1. exchanges (rows, elements per row) of every rank, so a mismatch is an error on all ranks instead of a hang;
2. pads every rank to the largest count, gathers once, and cuts the padding out again, in rank order;
3. in backward adds up what every rank asks of each row and hands each rank its own rows (reduce-scatter), which makes
   the gradient exact: a row that only other ranks' losses use still gets its gradient.

All functions are collective: every rank must call them in the same order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_train.distributed.waiting import waits
from vlm_train.errors import VlmError


@contextmanager
def group(device: str) -> Iterator[None]:
    """This process among the ranks of the environment (torchrun's variables); `device`: `cpu` or `cuda`."""
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether several ranks take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 when there is one process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of ranks; 1 when there is one process."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Waits for every rank."""
    if is_distributed():
        with waits("barrier"):
            dist.barrier()


def gather_rows(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """The rows of every rank in rank order: [n, ...] -> [sum of n over ranks, ...], differentiable.

    `n` may differ between ranks and may be 0. The backward pass is a collective too, so `x` must require gradient on
    every rank or on none. `counts`: what `row_counts(x)` returned, where the caller has asked already.

    Raises:
        VlmError: on every rank, when ranks disagree on the shape of a row.
    """
    if not is_distributed():
        return x
    sizes = row_counts(x) if counts is None else counts
    return _GatherRows.apply(x, sizes) if max(sizes) > 0 else x


def row_counts(x: Tensor) -> list[int]:
    """Rows of `x` on each rank. Waits for the device, since the host must know them.

    Raises:
        VlmError: on every rank, when ranks disagree on the shape of a row.
    """
    if not is_distributed():
        return [x.shape[0]]
    mine = torch.tensor([x.shape[0], math.prod(x.shape[1:])], device=x.device)
    table = torch.empty(2 * world_size(), dtype=mine.dtype, device=x.device)
    with waits("all_gather", mine):
        dist.all_gather_into_tensor(table, mine)
    counts, row_sizes = table.view(-1, 2).T.tolist()
    if len(set(row_sizes)) > 1:
        raise VlmError("Ranks hold rows of different shapes", got=row_sizes, allowed="equal elements per row")
    return counts


def gather_rows_detached(x: Tensor) -> Tensor:
    """As `gather_rows`, without gradient. Any dtype."""
    return gather_rows(x.detach())


def gather_objects(value: Any) -> list[Any]:
    """One JSON-serialisable value per rank -> the list of all, on every rank. JSON: nothing is ever unpickled here."""
    text = torch.frombuffer(bytearray(json.dumps([value]).encode()), dtype=torch.uint8)
    document = gather_rows(text.to(_wire_device())).cpu().numpy().tobytes().decode()
    # each value travels as a list of one: JSON lists end themselves, so no second exchange tells where to cut
    decoder, values, position = json.JSONDecoder(), [], 0
    while position < len(document):
        (item,), position = decoder.raw_decode(document, position)
        values.append(item)
    return values


def all_reduce_sum(x: Tensor) -> Tensor:
    """Element-wise sum over ranks, as a new tensor without gradient."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def all_reduce_max(x: Tensor) -> Tensor:
    """Element-wise maximum over ranks, as a new tensor without gradient."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def broadcast(x: Tensor) -> Tensor:
    """What rank 0 has, as a new tensor without gradient where `x` lies."""
    if not is_distributed():
        return x.detach().clone()
    wire = x.detach().to(x.device if x.device.type == "cuda" else _wire_device()).clone()
    with waits("broadcast", wire):
        dist.broadcast(wire, src=0)
    return wire.to(x.device)


def _all_reduce(x: Tensor, operation: Any) -> Tensor:
    total = x.detach().clone()
    if is_distributed():
        with waits("all_reduce", total):
            dist.all_reduce(total, op=operation)
    return total


def _wire_device() -> torch.device:
    """Where host data must lie to be sent: the accelerator under NCCL, the host otherwise."""
    on_gpu = is_distributed() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


class _GatherRows(torch.autograd.Function):
    """all-gather of padded rows; backward: reduce-scatter of the same layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: x.shape[0]] = x
        gathered = x.new_empty(len(sizes) * max(sizes), *x.shape[1:])
        with waits("all_gather", padded):
            dist.all_gather_into_tensor(gathered, padded)
        if min(sizes) == max(sizes):
            return gathered
        return torch.cat([part[:size] for part, size in zip(gathered.chunk(len(sizes)), sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sizes: list[int] = ctx.sizes
        # a fresh buffer even when nothing needs padding: backends reduce in place, and `grad` may belong to others
        padded = grad.new_zeros(len(sizes), max(sizes), *grad.shape[1:])
        for part, rows, size in zip(padded, grad.split(sizes), sizes, strict=True):
            part[:size] = rows
        mine = grad.new_empty(max(sizes), *grad.shape[1:])
        with waits("reduce_scatter", padded):
            dist.reduce_scatter_tensor(mine, padded.flatten(0, 1))
        return mine[: sizes[dist.get_rank()]], None
