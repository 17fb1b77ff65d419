"""Functions of shards as tasks of a Ray cluster. Ray says where each runs, and begins again those whose process died.

Needs `pip install 'vlm-train[ray]'` on every node, and what the functions read and write on a file system that all
nodes share.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vlm_train import __version__
from vlm_train.curation.engines import seen_from
from vlm_train.errors import ConfigError, VlmError

_NUM_RETRIES = 3  # of a task whose process died; one that dies of what it reads must come to an end
_PATIENCE = 10  # seconds, for a cluster to answer
_STORE = 100 * 2**20  # bytes of shared memory: items and results are small. Ray takes 75 MB at least, else a third


@dataclass(frozen=True, slots=True, kw_only=True)
class Ray:
    """Tasks of a Ray cluster. The first map connects, `close` ends that; a program that is connected stays so.

    `address`: of the cluster, as `ray.init` takes it; None starts one on this machine, which ends with this process.
    `num_workers`: tasks at a time; None is as many as the cluster has cores, or GPUs for what runs a model.
    """

    address: str | None = None
    num_workers: int | None = None

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], *, runs_model: bool = False) -> Iterator[Any]:
        """See `Engine.map`."""
        if not items:
            return
        ray = _imported()
        if not ray.is_initialized():
            self._connect(ray)
        found = ray.cluster_resources()
        num_gpus = int(runs_model and found.get("GPU", 0) >= 1)
        num_slots = max(1, int(found.get("GPU" if num_gpus else "CPU", 0)))
        # a process does not end after its task, as it would by default where it has a GPU: it keeps its model
        task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=_NUM_RETRIES, max_calls=0)(_call)
        machine = socket.gethostname()
        calls = (task.remote(function, item, machine, __version__) for item in items)
        yield from _in_order(ray, calls, ahead=self.num_workers or 2 * num_slots)

    def close(self) -> None:
        """Ends what the first map began, and all that is under way there."""
        if "ray" in sys.modules:
            _imported().shutdown()

    def _connect(self, ray: ModuleType) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            if self.address is None:
                ray.init(address="local", num_cpus=self.num_workers or len(os.sched_getaffinity(0)),
                         include_dashboard=False, object_store_memory=_STORE, logging_level=logging.ERROR)  # fmt: skip
                return
            host, _, port = self.address.rpartition(":")
            if port.isdecimal():
                socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()  # Ray tries for minutes
            ray.init(address=self.address, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError("there is no Ray cluster to work on", got=f"{self.address}: {error}",
                              allowed="HOST:PORT, or auto on one of its nodes",
                              remedy="ray start --head on one node, ray start --address HOST:PORT on the others; "
                                     "or leave out the address") from error  # fmt: skip


def _imported() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed", got="engine ray", allowed="local and slurm without it",
                          remedy="pip install 'vlm-train[ray]'") from None  # fmt: skip
    return ray


def _in_order(ray: ModuleType, calls: Iterator[Any], *, ahead: int) -> Iterator[Any]:
    """Results of calls, in their order; `ahead`: how many are begun before the first of them is read. After an error
    the others come to their end: `ray.cancel` with force may crash this process (Ray 2.60)."""
    pending = deque(itertools.islice(calls, ahead))
    while pending:
        yield _result(ray, pending.popleft())
        pending.extend(itertools.islice(calls, 1))


def _result(ray: ModuleType, call: Any) -> Any:
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VlmError):
            raise error.cause from None
        if isinstance(error.cause, ModuleNotFoundError):
            raise ConfigError("a node of the Ray cluster lacks a package", got=error.cause, allowed="the same on all",
                              remedy="install the same vlm-train on every node") from error  # fmt: skip
        raise error.cause from error  # whose text is the traceback of the task
    except ray.exceptions.RayError as error:
        raise VlmError(
            f"a task died {_NUM_RETRIES + 1} times on Ray",
            got=str(error).splitlines()[0],
            remedy="see the logs of its nodes; then start again: what is finished stays",
        ) from error


def _call(function: Callable[[Any], Any], item: Any, machine: str, version: str) -> Any:
    """On a node: `function(item)`, for `machine`, which has vlm-train `version`."""
    if version != __version__:
        found = f"{__version__} on {socket.gethostname()}"
        raise ConfigError("a node of the Ray cluster has another vlm-train", got=found, allowed=version,
                          remedy="install the same on every node")  # fmt: skip
    try:
        return function(item)
    except (VlmError, OSError) as error:
        raise seen_from(machine, error) from None
