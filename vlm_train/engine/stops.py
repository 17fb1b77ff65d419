"""Signals that ask a run to stop: a flag that all ranks agree on.

A signal handler only sets the flag. It is agreed on by all ranks at the end of a step (a maximum over ranks, so one
signalled rank is enough); every rank then saves at that same step, and the run ends with the shell's code for the
signal.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vlm_train.errors import VlmError

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; preemption; the end of the time that was asked for; by hand. Named here once, for who starts and watches
ranks too, which know no torch."""


class Interrupted(VlmError):
    """The run was asked to stop and has saved its state. Exit code 128 + signal, as shells use."""

    def __init__(self, signum: int, step: int, path: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; state is in {path}",
            remedy="run the same command again: it resumes",
        )
        self.exit_code = 128 + signum


class StopSignals:
    """Takes the signals over while a run can save."""

    def __init__(self) -> None:
        self._signal = 0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def take(self) -> None:
        """From now on a signal sets the flag; a second Ctrl-C ends at once."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def give_back(self) -> None:
        """The signals do what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def send_again(self) -> None:
        """A signal that came too late to be seen, to who has the signals now."""
        if self._signal:
            signal.raise_signal(self._signal)

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank met, 0 for none. Collective."""
        import torch

        from vlm_train.distributed import collectives

        return int(collectives.all_reduce_max(torch.tensor([self._signal], device=device)).item())

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker: a scheduler signals every process, the trainer decides
            return
        if self._signal and signum == signal.SIGINT:
            os._exit(128 + signum)
        self._signal = signum
