"""Where functions of shards run: `map` over shards, in processes of this machine.

The functions that curation maps write what they find to files of their own, or return it; they look at their shard and
at nothing else. So where and in what order they run, and how often they are begun, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vlm_train.data.parallel import map_in_processes


class Engine(Protocol):
    """Runs functions of shards."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, runs_model: bool = False) -> Iterator[Any]:
        """`function(item)` of each item, in their order, while others are under way. `function` and the items can be
        pickled. `runs_model`: a call takes a GPU, or all cores where there is none. Raises what a function raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Processes of this machine. `num_workers`: None is one for each core that this process may use."""

    num_workers: int | None = None

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, runs_model: bool = False) -> Iterator[Any]:
        """See `Engine.map`."""
        workers = 1 if runs_model else self.num_workers
        yield from map_in_processes(function, items, num_workers=workers, chunk_size=1)
