"""`vlm-train submit --watch`: the log of a job until it ends."""

from __future__ import annotations

import re
import time
from pathlib import Path

from vlm_train.cli.slurm_script import LOG
from vlm_train.engine.requeue import scontrol

_EVERY_SECONDS = 2.0
_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "PREEMPTED")


def watch(job: str, folder: Path) -> int:
    """Shows what the job writes, and what becomes of it. Returns 0 where it was COMPLETED. Ctrl-C ends this alone."""
    shown, state = 0, ""
    try:
        while True:
            before, state = state, state_of(job)
            if state != before:
                print(f"[{job} {state}]", flush=True)
            shown = _show(folder / LOG, shown)
            if state not in _WAITS:
                return 0 if state == "COMPLETED" else 1
            time.sleep(_EVERY_SECONDS)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; scancel {job} ends it")
        return 0


def state_of(job: str) -> str:
    """The state of a job in SLURM's words, UNKNOWN when SLURM has forgotten it."""
    told, _ = scontrol("show", "job", job)
    found = re.search(r"JobState=(\w+)", told)
    return found[1] if found else "UNKNOWN"


def _show(log: Path, shown: int) -> int:
    """Prints a file from a position on; returns its end."""
    if not log.is_file():
        return shown
    with open(log, "rb") as file:
        file.seek(shown)
        text = file.read()
    print(text.decode(errors="replace"), end="", flush=True)
    return shown + len(text)
