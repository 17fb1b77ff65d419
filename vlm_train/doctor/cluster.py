"""SLURM: settings of the administrator that decide whether a preempted run can save and come back."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping

from vlm_train.doctor.findings import GREEN, YELLOW, Finding
from vlm_train.engine.requeue import scontrol

LEAST_SECONDS = 30
"""That a run needs to finish its step and to save."""


def slurm(save_seconds: float = LEAST_SECONDS) -> Iterator[Finding]:
    """What `scontrol` says; nothing where there is no SLURM. `save_seconds`: a save takes."""
    if shutil.which("scontrol") is None:
        yield Finding("slurm", GREEN, "not here")
        return
    told, why = configuration()
    if why:
        yield Finding("slurm", YELLOW, f"installed, but no controller answers: {why}",
                      "where there is a cluster, run this on its login node")  # fmt: skip
        return
    yield from judged(settings_of(told), save_seconds)
    told, _ = scontrol("show", "partition", "--oneliner")
    for line in told.splitlines():
        yield from of_partition(dict(re.findall(r"(\w+)=(\S+)", line)), save_seconds)


def configuration() -> tuple[str, str]:
    """(`scontrol show config`, why no controller answers in the last line of what SLURM says; empty where one does)."""
    told, refusal = scontrol("show", "config")
    return told, "" if refusal is None else (refusal.splitlines() or ["it says nothing"])[-1]


def settings_of(text: str) -> dict[str, str]:
    """NAME = VALUE by lines, as `scontrol show config` prints them."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def judged(settings: Mapping[str, str], save_seconds: float) -> Iterator[Finding]:
    """Of the whole cluster."""
    yield Finding("slurm", GREEN, f"{settings.get('ClusterName', '?')}, SLURM {settings.get('SLURM_VERSION', '?')}")
    if settings.get("JobRequeue", "1") == "0":
        yield Finding("slurm_requeue", YELLOW, "JobRequeue=0: jobs are not put back into the queue by themselves",
                      "`vlm-train submit` asks for it (--requeue); other scripts must, too")  # fmt: skip
    wait = _seconds(settings.get("KillWait", ""))
    if wait is not None and wait < save_seconds:
        yield Finding("slurm_kill_wait", YELLOW, f"KillWait is {wait} s: so long after SIGTERM at the time limit comes "
                      f"SIGKILL, and a save may take {save_seconds:.0f} s", "`vlm-train submit` saves before the limit "
                      "(launch.signal_seconds)")  # fmt: skip
    if settings.get("PreemptMode", "OFF") == "CANCEL":
        yield Finding("slurm_preempt", YELLOW, "PreemptMode=CANCEL: a preempted job does not come back by itself",
                      "--requeue in the job, or PreemptMode=REQUEUE of its partition")  # fmt: skip


def of_partition(about: Mapping[str, str], save_seconds: float) -> Iterator[Finding]:
    """Of a partition whose jobs can be preempted."""
    mode, name = about.get("PreemptMode", "OFF"), about.get("PartitionName", "?")
    grace = _seconds(about.get("GraceTime", "0")) or 0
    if mode in ("OFF", "SUSPEND") or grace >= save_seconds:
        return
    yield Finding("slurm_grace", YELLOW, f"partition {name}: preempted jobs get {grace} s; a save may take "
                  f"{save_seconds:.0f} s", f"GraceTime={int(save_seconds)} of the partition, or a smaller "
                  "checkpoint.every_steps: what was not saved is trained again")  # fmt: skip


def _seconds(text: str) -> int | None:
    found = re.match(r"(\d+)", text)
    return int(found[1]) if found else None
