"""`python -m vlm_train.cli.rank RUN_DIR [CHECKPOINT]`: what each rank runs. The config was composed before.

The environment says which rank this is: with the variables of torchrun, as our launcher sets them too, or with those of
srun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from vlm_train.cli import slurm_ranks
from vlm_train.cli.outcome import leave, tell
from vlm_train.engine.requeue import Job
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError, VlmError
from vlm_train.log import global_rank

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Trains this rank's share."""
    run, checkpoint = _places(arguments)
    slurm_ranks.adopt()
    job = Job.from_environment()
    if job is not None:
        slurm_ranks.stop_before_training(RunDirectory(run))
    _check_world_size(run)
    if job is not None:
        slurm_ranks.train(run, checkpoint, job)
    else:
        from vlm_train import training

        training.train(run, checkpoint)


def run_rank(work: Callable[[list[str]], None], arguments: list[str]) -> NoReturn:
    """Does `work` as one of several ranks, and ends the process; exit codes as in cli.main."""
    die_with_parent()
    try:
        work(arguments)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        code = error.exit_code if isinstance(error, VlmError) else 1
        if global_rank() == 0 or code < 128:
            tell(error, arguments, who=f"[rank {global_rank()}] ")
        # other ranks may wait for this one in a collective; tearing the process group down would wait with them
        os._exit(code)
    leave(0)


def _places(arguments: list[str]) -> tuple[Path, Path | None]:
    """(run directory, checkpoint if one is named)."""
    if not 1 <= len(arguments) <= 2 or not (Path(arguments[0]) / "config.yaml").is_file():
        raise ConfigError("a rank needs the run that it trains", got=" ".join(arguments) or "none",
                          allowed="python -m vlm_train.cli.rank RUN_DIR [CHECKPOINT], RUN_DIR with a config.yaml",
                          remedy="vlm-train train ... makes the run, and starts its ranks")  # fmt: skip
    return Path(arguments[0]), Path(arguments[1]) if len(arguments) == 2 else None


def _check_world_size(run: Path) -> None:
    """Raises ConfigError where there are more or fewer ranks than the run is for."""
    from vlm_train.schema import read_config

    trainer = read_config(run).trainer
    wanted, found = trainer.devices * trainer.num_nodes, int(os.environ.get("WORLD_SIZE", "1"))
    if found != wanted:
        raise ConfigError(f"{run} is for another number of ranks", got=f"WORLD_SIZE={found}",
                          allowed=f"trainer.devices={trainer.devices} on each of trainer.num_nodes={trainer.num_nodes}",
                          remedy=f"start {wanted} ranks, or change these keys")  # fmt: skip


def die_with_parent() -> None:
    """A killed launcher must not leave ranks that go on writing into its run (Linux)."""
    if sys.platform != "linux" or "VLM_TRAIN_PARENT" not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["VLM_TRAIN_PARENT"]):
        os._exit(1)


if __name__ == "__main__":
    run_rank(main, sys.argv[1:])
