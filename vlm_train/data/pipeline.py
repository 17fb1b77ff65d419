"""The loaders: batches come in step order from any number of workers, and resume on any number of ranks.

An item of the inner torch Dataset is a whole rank batch of one step (`steps.py`), not a sample. torch hands items to
its workers in turn and returns them in order, so worker k of K makes steps k, k + K, ... and cannot reorder anything.

What was *consumed* is counted where the trainer takes a batch, not where a worker prefetched it. The state is one small
JSON object without a rank in it: position in the stream, and what defines the stream, refused when that differs.

A run that went back after a spike leaves data out (`engine.rewinds`): its steps then jump in the stream.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.steps import EvalSteps, Steps, StreamSteps
from vlm_train.errors import CheckpointError, VlmError, reader_killed
from vlm_train.types import Batch, Jumps, Source, stream_step

_PR_SET_PDEATHSIG = 1


class TrainLoader:
    """The batches of one rank, one a step; resumes anywhere, on any number of ranks and workers.

    Args:
        steps: what a step holds (`steps.TrainSteps`, or `streaming.TapeSteps`).
        num_workers: worker processes of this rank; 0 loads in the trainer's process.
        jumps: where the run leaves data out.
    """

    def __init__(self, *, steps: StreamSteps, num_workers: int, jumps: Jumps = ()) -> None:
        self._steps, self._num_workers, self._jumps = steps, num_workers, jumps
        self._spec, self._definition = steps.spec, steps.definition()
        self._consumed = self._skipped = 0
        self._place = steps.place(0, None)

    def __len__(self) -> int:
        """Steps of the whole run, those already done included."""
        return self._spec.num_steps

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the first step that has not been consumed."""
        first = self._consumed // self._spec.global_batch
        order = (stream_step(step, self._jumps) for step in range(first, self._spec.num_steps))
        loader = _loader(self._steps, order, self._num_workers)
        try:
            for step, batch in enumerate(_run(loader), start=first):
                self._consumed = (step + 1) * self._spec.global_batch
                self._skipped = (batch["step"] - step) * self._spec.global_batch
                self._place = self._steps.place(self._consumed + self._skipped, batch)
                batch["step"] = step
                yield batch
        finally:
            _stop(loader)

    @property
    def samples_per_epoch(self) -> int | None:
        """Positions of one epoch; None where nobody knows before it is over."""
        return self._steps.samples_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: JSON, under 1 kB, the same on every rank."""
        return {**self._definition, **self._place, "consumed": self._consumed, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` stands; the next iteration starts there.

        Raises:
            CheckpointError: the state is of another stream, with the name of the field that differs; or it has left out
                other data than this run.
        """
        for name, value in self._definition.items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the data of this run is not the data of the checkpoint: `{name}` differs",
                    got=f"{value} in this run",
                    allowed=f"{state.get(name)}, as in the checkpoint",
                    remedy=f"restore `{name}`, or start a new run: run.resume=never",
                )
        consumed = state.get("consumed")
        if type(consumed) is not int or consumed < 0 or consumed % self._spec.global_batch:
            raise CheckpointError(
                "the loader state is damaged: `consumed` is not a whole number of steps",
                got=consumed,
                allowed=f"a multiple of the global batch, {self._spec.global_batch}",
            )
        last, skipped = max(consumed // self._spec.global_batch - 1, 0), state.get("skipped", 0)
        known = (stream_step(last, self._jumps) - last) * self._spec.global_batch if consumed else 0
        if skipped != known:
            raise CheckpointError(
                "the checkpoint has left out other data than the records of this run tell",
                got=f"{skipped} samples in the checkpoint",
                allowed=f"{known}, from the `rewind` lines of events.jsonl",
                remedy="restore events.jsonl, or start a new run: run.resume=never",
            )
        self._consumed, self._skipped = consumed, skipped
        self._place = {name: state.get(name) for name in self._place}
        self._steps.seek(self._place)


class EvalLoader:
    """Every sample of a source exactly once, in file order, cut into contiguous shares by `types.rank_share`.

    All ranks yield the same number of batches, of the same sizes: rows that are missing have weight 0, and so has a
    sample that cannot be used (it is reported, and nothing is counted in its place).

    Args:
        source: the samples.
        encoder: how records become batches.
        batch_size: samples of a batch on one rank.
        rank: this process.
        world_size: number of processes.
        num_workers: worker processes of this rank, kept between passes; 0 loads in the caller's process.
    """

    def __init__(
        self,
        *,
        source: Source,
        encoder: SampleEncoder,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
    ) -> None:
        steps = EvalSteps(source, encoder, batch_size, rank, world_size)
        self._loader = _loader(steps, range(len(steps)), num_workers)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return _run(self._loader)


def _loader(steps: Steps, order: Iterable[int], num_workers: int) -> DataLoader:
    """Workers are forked: they share the manifest's memory and need nothing sent to them."""
    return DataLoader(
        steps,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_WorkerStart(os.getpid()) if num_workers else None,
    )


def _run(loader: DataLoader) -> Iterator[Batch]:
    with _sigterm_blocked():
        items = iter(loader)  # starts the workers
    try:
        for item in items:
            if isinstance(item, VlmError):
                raise item
            yield item
    except (OSError, EOFError) as error:  # a batch was being handed over; where none was, torch says who was killed
        workers = {worker.sentinel: worker.pid for worker in getattr(items, "_workers", ())}
        for sentinel in wait(list(workers), timeout=1.0):
            raise reader_killed(workers[sentinel]) from error
        raise


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """For processes that are forked inside: some library starts a thread in a new process before it has its
    first word, and a thread that does not block a signal takes it for all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(loader: DataLoader) -> None:
    """Ends the workers now. torch does it when the iterator is collected, which takes it seconds after an exception."""
    iterator = loader._iterator
    loader._iterator = None
    if iterator is not None:
        iterator._shutdown_workers()  # type: ignore[attr-defined]


def _identity(item: Any) -> Any:
    return item


class _WorkerStart:
    """First act of a worker: take signals from the trainer alone, use one thread, and never outlive the trainer.

    A scheduler or a terminal signals every process of a job; what follows from that is for the trainer to decide. But a
    worker that ignored SIGTERM altogether would hang the trainer's exit, where Python terminates and joins it.
    """

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an ignored signal would not be kept for `sigwaitinfo`
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=self._obey, daemon=True).start()
        torch.set_num_threads(1)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # it died before the line above
            os._exit(1)

    def _obey(self) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != self.parent:
            pass
        os._exit(0)
