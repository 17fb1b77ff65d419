"""Rank-aware logging: rank 0 speaks, every rank may shout. No torch import; the rank comes from the environment."""

from __future__ import annotations

import logging
import os
import sys

from vlm_train.errors import ConfigError
from vlm_train.locations import scrubbed


def global_rank() -> int:
    """This process's rank as the launcher (torchrun or srun) set it; 0 when there is one process. Raises ConfigError
    where that is no number."""
    name = "RANK" if "RANK" in os.environ else "SLURM_PROCID"
    told = os.environ.get(name, "0")
    if not told.isdecimal():
        raise ConfigError(f"{name} in the environment does not say which rank this is", got=f"{name}={told}",
                          allowed="0, 1, 2, ... as torchrun and srun set it", remedy=f"unset {name}")  # fmt: skip
    return int(told)


class _Formatter(logging.Formatter):
    """`info` lines stand alone; warnings and errors say so, and say the rank when it is not 0. URLs are `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        rank = global_rank()
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        where = f"[rank {rank}] " if rank else ""
        return scrubbed(f"{where}{prefix}{record.getMessage()}")


def get_logger(name: str) -> logging.Logger:
    """A logger that writes to stderr: rank 0 from INFO up, other ranks from WARNING up."""
    root = logging.getLogger("vlm_train")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter())
        root.addHandler(handler)
        root.setLevel(logging.INFO if global_rank() == 0 else logging.WARNING)
        root.propagate = False
    return logging.getLogger(name)
