"""The command line with something slow in it: what the ledger and the watchdog must find.

    python scripts/proof/_slowness.py KIND WORD ...      vlm-train WORD ..., slow in one of these ways

loader: each batch comes late; disk: each flush takes long; rank: rank 1 computes late; hang: the last rank never comes
back with the batch of one step; deaf: as hang, and holds the interpreter; none: nothing is slow. The product knows
nothing of this: functions are replaced before it starts, in the launching process or in the ranks that it starts
through us.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_train.cli.outcome import leave

LATE_SECONDS = 0.1  # a batch, a step
FLUSH_SECONDS = 0.5
HANGS_AT = 41  # so late that its watchdog, which looks twice a second, knows how long a step takes
KIND = "SLOWNESS"
RANK = int(os.environ.get("RANK", "0"))


def slow_loader() -> None:
    from vlm_train.data.pipeline import TrainLoader

    plain = TrainLoader.__iter__

    def late(self: TrainLoader) -> Iterator[Any]:
        for batch in plain(self):
            time.sleep(LATE_SECONDS)
            yield batch

    TrainLoader.__iter__ = late  # type: ignore[method-assign]


def slow_disk() -> None:
    plain = os.fsync

    def late(descriptor: int) -> None:
        time.sleep(FLUSH_SECONDS)
        plain(descriptor)

    os.fsync = late  # type: ignore[assignment]


def slow_rank() -> None:
    from vlm_train.engine.steps import GradientStep

    plain = GradientStep.run

    def late(self: GradientStep, *arguments: Any) -> Any:
        time.sleep(LATE_SECONDS)
        return plain(self, *arguments)

    if RANK == 1:
        GradientStep.run = late  # type: ignore[method-assign]


def hang() -> None:
    _stop_at(lambda: time.sleep(1000))


def deaf() -> None:
    _stop_at(lambda: ctypes.PyDLL(None).sleep(1000))  # in C, with the interpreter held


def _stop_at(stop: Any) -> None:
    from vlm_train.data.pipeline import TrainLoader

    plain = TrainLoader.__iter__

    def never(self: TrainLoader) -> Iterator[Any]:
        for batch in plain(self):
            if batch["step"] + 1 == HANGS_AT:
                stop()
            yield batch

    if int(os.environ.get("WORLD_SIZE", "1")) - 1 == RANK:
        TrainLoader.__iter__ = never  # type: ignore[method-assign]


def call(folder: Path, kind: str, words: Sequence[str], *, expect: int = 0, timeout: float = 300) -> str:
    """Runs `vlm-train WORDS` to its end, slow in one way; returns what it printed."""
    import vlm_train

    paths = [str(Path(vlm_train.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.run([sys.executable, __file__, kind, *words], cwd=folder, env=environment, text=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             timeout=timeout)  # fmt: skip
    if process.returncode != expect:
        raise AssertionError(f"{kind}: ended with {process.returncode}, not {expect}:\n{process.stdout}")
    return process.stdout


KINDS = {"loader": slow_loader, "disk": slow_disk, "rank": slow_rank, "hang": hang, "deaf": deaf, "none": lambda: None}


def main() -> int:
    if KIND in os.environ:  # a rank
        from vlm_train.cli import rank

        KINDS[os.environ[KIND]]()
        rank.run_rank(rank.main, sys.argv[1:])
    from vlm_train.cli import launcher
    from vlm_train.cli.main import main as command

    kind, *words = sys.argv[1:]
    if "trainer.devices=2" not in words:
        KINDS[kind]()
    else:
        os.environ[KIND] = kind
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        launcher.launch.__kwdefaults__["module"] = "_slowness"  # type: ignore[index]
    return command(words)


if __name__ == "__main__":
    leave(main())
