"""Saves that training hardly waits for: at the edge of a step the state is copied, and a thread writes the copy.

The thread writes, flushes, checksums and commits (`checkpoints.py`) what was copied, while the next steps change the
tensors that it was copied from. At most one save is on its way: the next one waits for it, and so do whoever ends or
rewinds the run (`join`). What goes wrong in the thread is raised there, with its cause.

Sharded states are written by all ranks. Their threads exchange what they must (where to write, what lies where, the
checksum of each rank's file) through a gloo group that nobody else uses. That cannot deadlock with the collectives of
training: a group has connections of its own, every rank makes the same exchanges in it in the same order, as one save
is over before the next begins, and no thread waits for what a training loop has yet to do. A failure on one rank is
sent to the others in place of a result, so all end alike. The files of a shared disk would do to wait by, but a full
disk holds no message, and a cached directory shows an old one.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from vlm_train.engine import checkpoints
from vlm_train.engine.copies import Copies
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import CheckpointError

T = TypeVar("T")
REST = "meta.pt"
"""Of a sharded state: what is neither weights nor optimizer, as Lightning names it."""
PATIENCE = timedelta(hours=2)
"""How long the threads of ranks wait for each other: one may write to a slow disk what another had less of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What this rank has of a checkpoint. `content` is None where another rank writes all of it."""

    content: dict[str, Any] | None
    is_sharded: bool


class Staging:
    """Copies of a state in ordinary memory, pinned where the state is on a GPU. They are kept and filled again: memory
    that is new costs more than copying into it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copied(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with every tensor replaced by a copy on the host, complete when this returns. Valid until the next
        call. Tensors that share their memory go on to."""
        copied: dict[str, Any] = self._copied(state, (), {})
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def _copied(self, value: Any, where: tuple[Any, ...], known: dict[Any, Tensor]) -> Any:
        if isinstance(value, Tensor):
            return self._copied_tensor(value, where, known)
        if isinstance(value, dict):
            same = copy.copy(value)  # also of an OrderedDict's attributes, where torch keeps versions of modules
            for key, part in value.items():
                same[key] = self._copied(part, (*where, key), known)
            return same
        if type(value) in (list, tuple):
            return type(value)(self._copied(part, (*where, place), known) for place, part in enumerate(value))
        return copy.deepcopy(value)

    @torch.no_grad()
    def _copied_tensor(self, tensor: Tensor, where: tuple[Any, ...], known: dict[Any, Tensor]) -> Tensor:
        source = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = (source.data_ptr(), source.dtype, source.shape, source.stride(), type(tensor))
        if source.numel() and place in known:
            return known[place]
        buffer = self._buffers.get(where)
        if buffer is None or not _are_alike(buffer, tensor):
            buffer = self._buffers[where] = _like_on_host(tensor)
        target = buffer.to_local() if isinstance(buffer, DTensor) else buffer
        target.copy_(source, non_blocking=True)
        known[place] = buffer
        return buffer


def _are_alike(buffer: Tensor, tensor: Tensor) -> bool:
    if isinstance(buffer, DTensor) != isinstance(tensor, DTensor):
        return False
    is_same = isinstance(tensor, DTensor) and isinstance(buffer, DTensor) and buffer.placements == tensor.placements
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and (is_same or type(tensor) is not DTensor)


def _like_on_host(tensor: Tensor) -> Tensor:
    """Memory on the host for a copy of `tensor`; of a sharded one for this rank's part, told as such."""
    if isinstance(tensor, DTensor):
        host = copy.deepcopy(tensor.detach()) if tensor.device.type == "cpu" else tensor.detach().to("cpu")
        assert isinstance(host, DTensor)
        if tensor.device.type == "cuda" and host._local_tensor.numel():
            host._local_tensor = host._local_tensor.pin_memory()
        return host
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda" and tensor.numel() > 0)


class Saver:
    """Writes and commits the state of one step at a time.

    Args:
        run: whose checkpoints and events these are.
        keep, keep_every_steps: which stay, see `checkpoints.retired`.
        asynchronous: training goes on while a copy of the state is written; else it waits, and no copy is made.
        copies: of committed checkpoints, in a store.
    """

    def __init__(
        self,
        *,
        run: RunDirectory,
        keep: int,
        keep_every_steps: int | None,
        asynchronous: bool,
        copies: Copies | None = None,
    ) -> None:
        self.run, self.keep, self.keep_every_steps = run, keep, keep_every_steps
        self.asynchronous, self.copies = asynchronous, copies
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = 0

    def save(self, step: int, state: State) -> None:
        """Begins to write the state after `step` steps; when this returns, training may change it. Collective.

        Raises CheckpointError if the save before it failed, or this one where it is not asynchronous.
        """
        self.join()
        self._step, content = step, state.content
        if content is None:
            return
        if state.is_sharded:
            _group()  # made here, in the order in which every rank meets collectives
        if not self.asynchronous:
            self._write(content, state.is_sharded)
            return self.join()
        copied = self._staging.copied(content)
        # a daemon: who ends the process without `join` does not want to wait, and what is half written is no checkpoint
        self._thread = threading.Thread(
            target=self._write, args=(copied, state.is_sharded), name="checkpoint", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Waits until nothing is being written. Raises CheckpointError, once, if the save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(
                f"the checkpoint of step {self._step} could not be written: {_told(error)}",
                got=f"{shutil.disk_usage(self.run.checkpoints).free / 1e6:.0f} MB free in {self.run.checkpoints}",
                remedy="free space, then run the same command: it resumes from the last committed checkpoint",
            ) from error

    def finish(self, seconds: float) -> None:
        """As `join`; and so many seconds at most for copies in a store."""
        self.join()
        if self.copies is not None:
            self.copies.wait(seconds)

    def _write(self, content: dict[str, Any], is_sharded: bool) -> None:
        """Runs in the thread. Keeps what goes wrong for `join`."""
        started, temporary = time.perf_counter(), None
        try:
            temporary = Path(_agreed(lambda: str(checkpoints.begin(self.run.checkpoints, self._step)), is_sharded)[0])
            write = _write_shard if is_sharded else _write_whole
            entries = _agreed(lambda: write(content, temporary), is_sharded, everywhere=True)
            _agreed(lambda: self._commit(temporary, entries, started), is_sharded)
        except (Exception, CheckpointException) as error:
            self._error = error
            if temporary is not None and _rank(is_sharded) == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _commit(self, temporary: Path, entries: list[dict[str, checkpoints.Entry]], started: float) -> None:
        joined = {name: entry for part in entries for name, entry in part.items()}
        final = checkpoints.commit(
            temporary, self._step, self.keep, keep_every_steps=self.keep_every_steps, entries=joined
        )
        # one write, so the thread of the training loop may write another line meanwhile
        seconds = round(time.perf_counter() - started, 3)
        self.run.event("checkpoint", {"step": self._step, "path": final.name, "seconds": seconds})
        if self.copies is not None:
            self.copies.start()


def _write_whole(state: dict[str, Any], folder: Path) -> dict[str, checkpoints.Entry]:
    """One file with everything."""
    torch.save(state, folder / checkpoints.STATE)
    return {checkpoints.STATE: checkpoints.entry(folder / checkpoints.STATE)}


def _write_shard(state: dict[str, Any], folder: Path) -> dict[str, checkpoints.Entry]:
    """This rank's file, and on rank 0 what lies where; what this rank wrote, by name. Collective in the threads."""
    target = folder / checkpoints.STATE
    tensors = {"state_dict": state["state_dict"]}
    tensors |= {f"optimizer_{place}": part for place, part in enumerate(state["optimizer_states"])}
    writer = distributed_checkpoint.FileSystemWriter(target, single_file_per_rank=True)
    distributed_checkpoint.save(tensors, storage_writer=writer, process_group=_group())
    mine = sorted(target.glob(f"__{dist.get_rank()}_*.distcp"))
    if dist.get_rank() == 0:
        rest = {key: value for key, value in state.items() if key not in ("state_dict", "optimizer_states")}
        torch.save(rest, target / REST)
        mine += [target / REST, target / ".metadata"]
    return {str(file.relative_to(folder)): checkpoints.entry(file) for file in mine}


@cache
def _group() -> dist.ProcessGroup:
    """The group of the threads, one for the life of the process. The first call is collective."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _rank(is_sharded: bool) -> int:
    return dist.get_rank() if is_sharded else 0


def _agreed(action: Callable[[], T], is_sharded: bool, *, everywhere: bool = False) -> list[T]:
    """What `action` returns on rank 0, or `everywhere` on each rank, known to all; also that it failed on one."""
    if not is_sharded:
        return [action()]
    mine: tuple[T | None, BaseException | None] = (None, None)
    if everywhere or dist.get_rank() == 0:
        try:
            mine = (action(), None)
        except (Exception, CheckpointException) as error:
            mine = (None, error)
    told: list[Any] = [None] * dist.get_world_size()
    own_message = (mine[0], None if mine[1] is None else _told(mine[1]))
    dist.all_gather_object(told, own_message, group=_group())
    if mine[1] is not None:
        raise mine[1]
    for rank, (_, message) in enumerate(told):
        if message is not None:
            raise CheckpointError(f"rank {rank}: {message}")
    return [result for result, _ in told]


def _told(error: BaseException) -> str:
    """What happened, without the traces that torch adds of every rank."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {cause}"
    return str(error)
