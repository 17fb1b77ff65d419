"""Runs a function on several real gloo processes of this machine, for tests and proofs.

Processes are forked from one that has only imported what `multiprocessing.set_forkserver_preload` names (never from
the caller: torch's threads do not survive a fork). They meet through a file, talk over the loopback interface and hand
back their result through a file that is read without unpickling code. The first rank that fails ends the others, so a
failure never becomes a wait for the timeout of a collective.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlm_train.errors import VlmError


class RankFailure(VlmError):
    """A rank of `run_ranks` raised, died or did not finish in time; `got` holds its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """`fn(*args)` on each of `world_size` gloo processes; returns the results in rank order.

    Args:
        fn: a module-level function. It asks `collectives.rank()` who it is.
        args: sent to the processes by pickle, as `multiprocessing` does.
        timeout: seconds for everything, including the start of the processes.

    The result of `fn` may hold tensors, numbers, strings, None and dicts, lists and tuples of them.

    Raises:
        RankFailure: with the traceback of the first rank that failed.
    """
    context = multiprocessing.get_context("forkserver")
    environment = dict(os.environ)  # that of the process they are forked from may be older
    with tempfile.TemporaryDirectory(prefix="vlm-train-ranks-") as folder:
        processes = [
            context.Process(
                target=_rank_main, args=(fn, rank, world_size, folder, timeout, environment, args), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), timeout)
        finally:
            _end(processes)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    running = dict(enumerate(processes))
    while running:
        if not wait([process.sentinel for process in running.values()], timeout=max(0.0, deadline - time.monotonic())):
            raise RankFailure(f"Ranks {sorted(running)} of {len(processes)} did not finish within {timeout:g} s")
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode != 0:
                report = folder / f"{rank}.error"
                text = report.read_text() if report.exists() else f"exit code {process.exitcode}, no traceback"
                raise RankFailure(f"Rank {rank} of {len(processes)} failed", got=text)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    interfaces = {name for _, name in socket.if_nameindex()}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if "lo" in interfaces else "lo0")
    torch.set_num_threads(1)  # several ranks share the cores of one machine
    try:
        dist.init_process_group(
            "gloo",
            init_method=Path(folder, "store").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = fn(*args)
        torch.save(result, Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
