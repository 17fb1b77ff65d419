"""One task of a job array of `on_slurm`: `python -m vlm_train.curation.slurm_task FOLDER`.

Calls and results are pickles, since functions of modules, paths and errors go between two processes of one user, as
they do through the pipes of `multiprocessing`. A pickle may run anything, so a folder that others can enter is refused.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_train import __version__
from vlm_train.curation.engines import Local, seen_from
from vlm_train.data.home import write_whole
from vlm_train.errors import ConfigError, VlmError


@dataclass(frozen=True, slots=True)
class Call:
    """What a task maps, with how many processes, and of which machine and vlm-train it is."""

    function: Callable[[Any], Any]
    items: Sequence[Any]
    runs_model: bool = field(kw_only=True)
    num_processes: int = field(kw_only=True)
    machine: str = field(default_factory=socket.gethostname)
    version: str = __version__


def call_file(folder: Path, number: int) -> Path:
    """Where the call of a task stands."""
    return folder / f"{number}.call"


def result_file(folder: Path, number: int) -> Path:
    """Where a task leaves (results, error): results of its items in order, up to the one that raised the error."""
    return folder / f"{number}.result"


def main(folder: Path, number: int) -> int:
    """Runs a task; what nobody foresaw goes to its log, with a traceback."""
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError("a task takes calls from its own user only", got=folder, allowed="a folder of mode 700",
                          remedy="start again: the folder is made anew")  # fmt: skip
    call: Call = pickle.loads(call_file(folder, number).read_bytes())
    results: list[Any] = []
    found: VlmError | OSError | None = None
    try:
        if call.version != __version__:
            raise ConfigError("a node of SLURM has another vlm-train", got=f"{__version__} on {socket.gethostname()}",
                              allowed=call.version, remedy="install the same on every node")  # fmt: skip
        engine = Local(num_workers=call.num_processes)
        results.extend(engine.map(call.function, call.items, runs_model=call.runs_model))
    except (VlmError, OSError) as error:
        found = seen_from(call.machine, error)
    write_whole(result_file(folder, number), pickle.dumps((results, found)))
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(os.environ["SLURM_ARRAY_TASK_ID"])))
