"""One process per rank on this machine, by the environment contract of torchrun.

Why not torchrun itself here: its agent hides which exit code a rank ended with, signals every rank a second time on
Ctrl-C, and leaves ranks behind when it is killed. Ranks started by torchrun or srun elsewhere run the same module
(`python -m vlm_train.cli.rank RUN_DIR`) and see the same variables.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from vlm_train.engine.stops import SIGNALS
from vlm_train.errors import VlmError

SAVE_SECONDS = 120.0  # how long ranks may take to finish after one of them ended
FAIL_SECONDS = 5.0


def launch(arguments: Sequence[str], num_ranks: int, *, module: str = "vlm_train.cli.rank") -> int:
    """Runs `python -m MODULE ARGUMENTS` on `num_ranks` ranks. Returns the first exit code that is not 0.

    Raises:
        VlmError: a rank was killed, and no other knows a reason.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks),
              "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(num_ranks), "VLM_TRAIN_PARENT": str(os.getpid())}  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    # an own session: Ctrl-C reaches the ranks once, through us
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}, start_new_session=True
        )
        for r in range(num_ranks)
    ]

    unheard: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        alive = [process for process in ranks if process.poll() is None]
        for process in alive:
            process.send_signal(signum)
        if not alive:
            unheard.append(signum)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        return _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for signum in unheard[:1]:  # it came when all had ended: it is meant for us
            signal.raise_signal(signum)


def free_port() -> int:
    """One that nobody on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    first_failure, deadline = 0, float("inf")
    while None in [process.poll() for process in ranks] and time.monotonic() < deadline:  # each is asked every time
        for process in ranks:
            if process.returncode and not first_failure:
                first_failure = process.returncode
                saved = first_failure - 128 in SIGNALS
                deadline = time.monotonic() + (SAVE_SECONDS if saved else FAIL_SECONDS)
        time.sleep(0.05)
    codes = [first_failure, *(process.returncode or 0 for process in ranks)]
    killed = [rank for rank, code in enumerate(codes[1:]) if code < 0 and -code not in SIGNALS]
    if killed and max(codes) <= 1:  # a rank that fails with 1 may only have lost the one that was killed
        name = signal.Signals(-codes[1 + killed[0]]).name
        raise VlmError(f"rank {killed[0]} was ended by {name}",
                       remedy="where memory ran out, `dmesg` says so; the same command resumes")  # fmt: skip
    said = next((code for code in codes if code > 0), None)
    return said if said is not None else next((128 - code for code in codes if -code in SIGNALS), int(any(codes)))
