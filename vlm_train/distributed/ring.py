"""Blocks of rows that travel round the ranks, so that each rank meets every block without holding more than two.

Rank r starts with its own block, hands it to rank r - 1 and takes that of rank r + 1: after h hops it holds the block
of rank r + h, and after as many hops as there are ranks its own is home again, with what the others added to it. A
hop is sent while the rank computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.distributed.waiting import waits


@dataclass(frozen=True, slots=True)
class Hop:
    """Tensors on their way. `sent` is kept until they have left: a backend reads them from where they lie."""

    works: list[dist.Work]
    sent: list[Tensor]
    arriving: list[Tensor]

    def wait(self) -> list[Tensor]:
        """What the next rank held."""
        for work in self.works:
            with waits("ring_pass", self.arriving[0]):
                work.wait()
        return self.arriving


def pass_on(tensors: Sequence[Tensor]) -> Hop:
    """Starts one hop of tensors whose shapes are equal on every rank. Collective; hops end in the order they began."""
    rank, world_size = collectives.rank(), collectives.world_size()
    sent = [tensor.contiguous() for tensor in tensors]
    if world_size == 1:
        return Hop([], sent, sent)
    arriving = [torch.empty_like(tensor) for tensor in sent]
    to, source = (rank - 1) % world_size, (rank + 1) % world_size
    operations = [dist.P2POp(dist.isend, tensor, to) for tensor in sent]
    operations += [dist.P2POp(dist.irecv, tensor, source) for tensor in arriving]
    return Hop(dist.batch_isend_irecv(operations), sent, arriving)


def padded(rows: Tensor, num_rows: int) -> Tensor:
    """[n, ...] -> [num_rows, ...], zeros behind: what travels has one shape on every rank."""
    if rows.shape[0] == num_rows:
        return rows
    out = rows.new_zeros(num_rows, *rows.shape[1:])
    out[: rows.shape[0]] = rows
    return out


def travelling(tensors: Sequence[Tensor], counts: list[int]) -> Iterator[list[Tensor]]:
    """What `tensors` hold on each rank in turn, this rank first. `counts`: rows of every rank. Collective."""
    rank, world_size = collectives.rank(), len(counts)
    block = [padded(tensor, max(counts)) for tensor in tensors]
    for hop in range(world_size):
        ahead = pass_on(block) if hop + 1 < world_size else None
        yield [tensor[: counts[(rank + hop) % world_size]] for tensor in block]
        block = ahead.wait() if ahead else block


class Homeward:
    """What travels behind the texts and grows on its way: each rank adds its part, and the whole comes home."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self.hop: Hop | None = None

    def add(self, part: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> None:
        """This rank's part about the texts it holds now; call once for each block of `travelling`."""
        if self.hop is not None:
            (before,) = self.hop.wait()
            part = merge(before[: len(part)], part)
        self.hop = pass_on([padded(part, max(self.counts))])

    def arrived(self) -> Tensor:
        """The whole, for this rank's own texts."""
        assert self.hop is not None
        (whole,) = self.hop.wait()
        return whole[: self.counts[collectives.rank()]]
