"""Who wants to know when this process waits for other ranks: one observer, told at both ends of every exchange.

The exchanges do not know who counts their time or looks for ranks that hang; the engine says so once, by `observe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "ring_pass")
"""Every name that `waits` is called with."""


class Observer(Protocol):
    """What is told of exchanges."""

    def begin(self, name: str, x: Tensor | None) -> None:
        """This rank has reached an exchange; `x`: what it sends, None where nothing travels."""

    def end(self, x: Tensor | None) -> None:
        """The call has come back: on a CPU with every rank's part, on a GPU as soon as the work is queued."""


class _Nobody:
    def begin(self, name: str, x: Tensor | None) -> None:
        pass

    def end(self, x: Tensor | None) -> None:
        pass


_observer: Observer = _Nobody()


def observe(observer: Observer | None) -> None:
    """From now on `observer` is told; None: nobody."""
    global _observer
    _observer = observer if observer is not None else _Nobody()


@contextmanager
def waits(name: str, x: Tensor | None = None) -> Iterator[None]:
    """Around one exchange. A failed one has not ended: where it happened is what the observer should keep."""
    _observer.begin(name, x)
    yield
    _observer.end(x)
