"""Where functions of shards run: `map` over shards, in processes of this machine, of a Ray cluster or of SLURM.

The functions that curation maps write what they find to files of their own, or return it; they look at their shard and
at nothing else. So where and in what order they run, and how often they are begun, changes nothing. Who schedules is
Ray or SLURM (`on_ray`, `on_slurm`); nothing here does.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

from vlm_train.data.parallel import map_in_processes
from vlm_train.errors import DataError, VlmError


class Engine(Protocol):
    """Runs functions of shards."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, runs_model: bool = False) -> Iterator[Any]:
        """`function(item)` of each item, in their order, while others are under way.

        Args:
            function: of a module. It may be called more than once of an item, and where other files than those that
                all machines share cannot be seen.
            items: what can be pickled; paths in them are absolute.
            runs_model: a call takes a GPU where there are any, else a core as any other.

        Raises:
            VlmError: a process died, or there is no such cluster.
            Exception: whatever a function raises, as it raised it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Processes of this machine. `num_workers`: None is one for each core that this process may use."""

    num_workers: int | None = None

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, runs_model: bool = False) -> Iterator[Any]:
        """See `Engine.map`. There is one process for a GPU: this one."""
        num_workers = 1 if len(items) == 1 or (runs_model and _has_gpu()) else self.num_workers
        try:
            yield from map_in_processes(function, items, num_workers=num_workers, chunk_size=1)
        except BrokenProcessPool as error:
            raise VlmError("a process of this machine was killed", got=error, remedy="start again: what is finished "
                           "stays; with fewer --num-workers where memory ran out") from error  # fmt: skip


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def seen_from(machine: str, error: VlmError | OSError) -> VlmError | OSError:
    """An error of a function as the user reads it who started `machine`: where it was raised on another, that one is
    named, and what both must see."""
    here = socket.gethostname()
    if here == machine:
        return error
    needs = f"{here} must see the files of {machine}: shards and their manifests, runs, and --out on what both share"
    if isinstance(error, OSError):
        return DataError(f"{here} was refused by its system", got=error, remedy=needs)
    remedy = needs if error.remedy is None else f"{error.remedy}; or, where it is right on {machine}: {needs}"
    return type(error)(error.what, got=f"{error.got} (on {here})", allowed=error.allowed, remedy=remedy)
