"""`map` over processes, for making and converting data; training's own workers are elsewhere (`pipeline`)."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int | None = None,
    chunk_size: int = 64,
) -> Iterator[Result]:
    """`map(function, items)` in fresh processes, results in order, a bounded number of chunks ahead of the reader.

    Workers leave Ctrl-C to the parent and die with it. `num_workers`: None is one for each core this process may use.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    if num_workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the parent's threads
    remaining = iter(items)
    chunks = iter(lambda: list(itertools.islice(remaining, chunk_size)), [])
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_follow_parent) as pool:
        started = (pool.submit(_map_chunk, function, chunk) for chunk in chunks)
        pending: deque[Future[list[Result]]] = deque(itertools.islice(started, 2 * num_workers))
        try:
            while pending:
                yield from pending.popleft().result()
                pending.extend(itertools.islice(started, 1))
        finally:
            for future in pending:
                future.cancel()


def _map_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
