"""What becomes of a job of SLURM whose run stopped early: it is queued again, or it fails and says why.

events.jsonl is all that is known: a run that was asked to stop goes on later; one that failed goes on if it got further
than ever before in this job, for a crash that comes again at the same step would come for ever. SLURM counts the
restarts, and the job has a cap. Each decision is a line: `requeue`, or `not_requeued`.

A job that left with exit code 0 would be COMPLETED for SLURM, and one that left with any other FAILED; so nothing ends
on its own after `scontrol requeue`: SLURM ends it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_train.engine.rundir import RunDirectory, read_lines
from vlm_train.log import get_logger

LOG = get_logger(__name__)

REQUEUE_EXIT = 75
"""Exit code of a job that wants to be queued again and may not say so to SLURM: for RequeueExit of slurm.conf."""
MAX_REQUEUES = "VLM_TRAIN_MAX_REQUEUES"
"""The cap of the job, in the environment of what its script starts."""

_USERS_MISTAKE = 2  # exit code of what no restart mends
_SCONTROL_SECONDS = 60
_STARTS = ("start", "resume")
_ENDS = (*_STARTS, "requeue", "requeue_refused", "not_requeued", "finished")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A batch job: `id` as `scontrol requeue` takes it, ARRAY_TASK for a task of an array."""

    id: str
    num_restarts: int
    max_requeues: int

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Job | None:
        """The job of this process; None outside of a job that `vlm-train submit` made."""
        if MAX_REQUEUES not in environment or "SLURM_JOB_ID" not in environment:
            return None
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return Job(
            id=f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"],
            num_restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            max_requeues=int(environment[MAX_REQUEUES]),
        )


def _is_over(told: str) -> bool:
    """Whether SLURM is ending the job for another reason than its time. `scancel JOB` warns the ranks by SIGTERM as a
    preemption does, but a preempted job is RUNNING until its grace time is over; and a job that is taken back could be
    queued again against the will of its user. `told`: what `scontrol show job` says, nothing where it is silent."""
    return bool(told) and "JobState=RUNNING" not in told and "Reason=TimeLimit" not in told


def _is_left_alone(told: str) -> bool:
    """Whether SLURM itself has not warned the job: SIGTERM is then how srun ends the ranks beside one that died."""
    return "PreemptTime=None" in told


def decide(run: RunDirectory, job: Job, code: int) -> bool:
    """Whether the job is to be queued again; the answer and its reason are written into events.jsonl.

    Args:
        run: the run, or the stage of one, that stopped early.
        job: its job.
        code: exit code of its ranks; of no account where they were asked to stop.
    """
    events = list(read_lines(run.events, "event"))
    last = events[-1]["event"] if events else ""
    if last in ("requeue_refused", "not_requeued"):  # decided already, by rank 0
        return last == "requeue_refused"
    reached = run.last_step() or _begun(events)
    told: dict[str, Any] = {"step": reached, "job": job.id, "restarts": job.num_restarts}
    reason, against = _weigh(events, job, code, reached)
    if against:
        run.event("not_requeued", {**told, "reason": reason, "because": against})
        LOG.error("%s stopped after step %d (%s) and is not queued again: %s", run.path, reached, reason, against)
    else:
        run.event("requeue", {**told, "reason": reason})
        LOG.info("%s stopped after step %d (%s): job %s is queued again", run.path, reached, reason, job.id)
    return not against


def requeue(run: RunDirectory, job: Job) -> bool:
    """Asks SLURM to queue the job again, which ends every process of the job. A refusal is written down."""
    _, refusal = scontrol("requeue", job.id)
    if refusal is not None:
        run.event("requeue_refused", {"job": job.id, "reason": refusal})
    return refusal is None


def scontrol(*words: str) -> tuple[str, str | None]:
    """Asks SLURM: (what it says, why it could not; None where it could)."""
    try:
        asked = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_SCONTROL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return asked.stdout, None if asked.returncode == 0 else asked.stderr.strip()


def _weigh(events: list[dict[str, Any]], job: Job, code: int, reached: int) -> tuple[str, str]:
    """(why the run stopped, what speaks against another start)."""
    ends = [number for number, row in enumerate(events) if row["event"] in _ENDS]
    asked = [row for row in events[ends[-1] + 1 if ends else 0 :] if row["event"] == "interrupted"]
    reason = asked[-1]["signal"] if asked else f"exit code {code}"
    told, _ = scontrol("show", "job", job.id)
    if _is_over(told):
        return reason, "the job was cancelled"
    if job.num_restarts >= job.max_requeues:
        return reason, f"the job was started again {job.num_restarts} times: launch.max_requeues={job.max_requeues}"
    has_saved = bool(asked) and asked[-1]["step"] > _begun(events)
    if has_saved or (asked and not (reason == "SIGTERM" and _is_left_alone(told))):
        return reason, ""
    if code == _USERS_MISTAKE:
        return reason, "another start would meet the same mistake"
    before = max([row["step"] for row in events if row["event"] == "requeue" and row["job"] == job.id], default=0)
    furthest = max(before, _begun(events))
    return reason, "" if reached > furthest else f"it got no further than step {furthest}, as before"


def _begun(events: list[dict[str, Any]]) -> int:
    """The step at which the last start began."""
    return next((row["step"] for row in reversed(events) if row["event"] in _STARTS), 0)
