"""Tells the ledger where one kind of work ends and the next begins, in Lightning's loop and in exchanges with ranks."""

from __future__ import annotations

import threading
from typing import Any

import lightning
import torch
from torch import Tensor
from torch._dynamo.callback import callback_handler

from vlm_train.distributed import waiting
from vlm_train.engine.ledger import STEP_ACCOUNTS, Ledger
from vlm_train.types import Batch


class Border(lightning.Callback):
    """Stands before the callbacks whose time after a step belongs to `account`."""

    def __init__(self, ledger: Ledger, account: str) -> None:
        self.ledger, self.account = ledger, account

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """What follows is another kind of work."""
        self.ledger.switch(self.account)

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """No step is worked on any more: what the callbacks behind have to finish may take its time."""
        self.ledger.at(0)


class Clock(lightning.Callback):
    """Stands last: what it hears after a step ends it. Listens to the exchanges and to the compiler meanwhile."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.waits = Waits(ledger)
        self._before = "compute"

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Begins to listen."""
        waiting.observe(self.waits)
        callback_handler.register_start_callback(self._compile_begins)
        callback_handler.register_end_callback(self._compile_ends)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Listens no more; what the process still does is no step."""
        self._stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """As above."""
        self._stop()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Everything that this step asked for is done."""
        self.waits.settle()
        self.ledger.step_ended(batch["step"] + 1)

    def _compile_begins(self, *told: object) -> None:
        self._before = self.ledger.switch("compile")

    def _compile_ends(self, *told: object) -> None:
        self.ledger.switch(self._before)

    def _stop(self) -> None:
        self.ledger.at(0)
        self.ledger.switch("overhead")
        waiting.observe(None)
        for registered, own in (
            (callback_handler.start_callbacks, self._compile_begins),
            (callback_handler.end_callbacks, self._compile_ends),
        ):
            if own in registered:
                registered.remove(own)


class Waits:
    """What exchanges cost (`waiting.Observer`).

    On a CPU the call returns when every rank has come, so it is the wait. On a GPU it returns at once, and the stream
    waits: an event before and one behind measure that on the GPU's own clock. They are read when a step has ended,
    which has waited for the loss anyway, and the seconds are taken from those in which the host waited for the GPU.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._thread = threading.get_ident()
        self._before = ""
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, name: str, x: Tensor | None) -> None:
        """What waits within evaluation or a checkpoint belongs to these. A thread beside the training is not in its
        way."""
        if threading.get_ident() != self._thread:
            return
        self._before = self.ledger.account
        on_gpu = x is not None and x.is_cuda
        account = "communication" if self._before in STEP_ACCOUNTS and not on_gpu else self._before
        self.ledger.switch(account, name.encode())
        if on_gpu and self._before in STEP_ACCOUNTS:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def end(self, x: Tensor | None) -> None:
        """The call has come back."""
        if threading.get_ident() != self._thread:
            return
        if x is not None and x.is_cuda and self._before in STEP_ACCOUNTS:
            self._events[-1][1].record()
        self.ledger.switch(self._before)

    def settle(self) -> None:
        """Books what the GPU waited since the last call, as far as it is through with it."""
        done = [pair for pair in self._events if pair[1].query()]
        self._events = self._events[len(done) :]
        if done:
            seconds = sum(first.elapsed_time(last) for first, last in done) / 1000
            self.ledger.move(seconds, "compute", "communication")
