"""`vlm-train submit`: what `vlm-train train` would do here, as a job of SLURM, which is queued again until it is done.

The run is named and its config composed once, now. RUN/submit/TIME holds a copy of the code, the resolved config and
job.sbatch, and the job reads nothing else of ours: one that is queued again days later runs the same. With `--sweep`
the runs are folders of one that holds them, and tasks of one array.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_train.cli.options import taken
from vlm_train.cli.paths import PACKAGE, conf_dir, slurm_dir
from vlm_train.cli.quantities import many
from vlm_train.cli.slurm_time import seconds_of
from vlm_train.cli.sweep_words import OPTIONS
from vlm_train.errors import ConfigError, VlmError, nearest

if TYPE_CHECKING:
    from vlm_train.cli.planned import PlannedRun
    from vlm_train.cli.slurm_config import LaunchConfig

USAGE = """usage: vlm-train submit [words of train] [launch.KEY=VALUE] [--sweep KEY=A,B,C] [--watch]

  vlm-train submit experiment=quickstart launch.partition=gpu launch.time=4:00:00
  vlm-train submit experiment=clip_b32 trainer.num_nodes=2 trainer.devices=8 strategy=ddp
  vlm-train submit experiment=quickstart --sweep seed=0,1,2 --sweep optim.lr=1e-3,3e-4

The job saves and is queued again when it is preempted, when its time is over, and when it fails after it got further
than before; it goes on from its newest checkpoint. Without sbatch here, or with launch.dry_run=true, the job is
written and not sent.

  launch.partition account qos constraint      where; as sbatch takes them
  launch.time launch.mem launch.cpus           time of the job, memory of a node, processors of a rank
  launch.gpu_type launch.sbatch                what GPUs are called here; further options of sbatch, a list
  launch.setup launch.container                lines of bash before all else, a list; an image
  launch.signal_seconds launch.max_requeues    how long before its end a job saves; when it gives up
  launch.dry_run=true                          write job.sbatch and do not send it
  --sweep KEY=A,B,C                            a run for each value, as an array; several: for each combination
  --watch                                      show the log until the job ends; Ctrl-C stops showing it
  all of them with their meaning: vlm-train configs show launch/slurm"""


def main(words: list[str]) -> int:
    """Runs the verb."""
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    from vlm_train.cli import slurm_watch
    from vlm_train.cli.overrides import split_config_dir
    from vlm_train.cli.slurm_config import compose_launch, is_of_launch
    from vlm_train.cli.submit_plan import plan_lines

    rest, sweeps, watches = split_options(words)
    _, extra = split_config_dir(rest)
    launch = compose_launch([word for word in rest if is_of_launch(word)] + (["--config-dir", extra] if extra else []))
    train_words = [word for word in rest if not is_of_launch(word)]
    is_dry = launch.dry_run or shutil.which("sbatch") is None
    if watches and (is_dry or sweeps):
        raise ConfigError("--watch shows the log of one job", got="--sweep" if sweeps else "a job that is not sent",
                          allowed="one run, where sbatch is", remedy="leave out --watch")  # fmt: skip
    runs = _runs(train_words, sweeps)
    print("\n".join([plan_line(runs, launch), *plan_lines(runs[0], launch)]), flush=True)
    folder = _write(runs, launch)
    job = folder / "job.sbatch"
    if is_dry:
        print(job.read_text(), end="")
        print(f"\nnot sent: {'launch.dry_run=true' if launch.dry_run else 'there is no sbatch here'}")
        print(f"next: sbatch {shlex.quote(str(job))}")
        return 0
    number = _send(job)
    print(f"job {number}: {job}\nnext: squeue --job {number}; tail -F {shlex.quote(str(folder))}/*log.txt")
    return slurm_watch.watch(number, folder) if watches else 0


def plan_line(runs: Sequence[PlannedRun], launch: LaunchConfig) -> str:
    """What is asked for, in one line."""
    trainer, several = runs[0].config.trainer, f"{len(runs)} runs, each " if len(runs) > 1 else ""
    nodes = f"{trainer.num_nodes} x " if trainer.num_nodes > 1 else ""
    ranks = f"{nodes}{many(trainer.devices, 'rank', 'ranks')}"
    limit = f"for at most {launch.time} at a time" if seconds_of(str(launch.time)) else "for as long as it takes"
    steps, samples = many(trainer.max_steps, "step", "steps"), many(trainer.global_batch, "sample", "samples")
    return f"plan: {several}{steps} of {samples} on {ranks} {limit}"


def split_options(words: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """(other words, what is swept over, whether the log is watched)."""
    rest, sweeps = taken(words, "--sweep")
    for word in rest:
        if word.partition("=")[0] in OPTIONS:
            raise ConfigError("the runs of an array are known when it is sent, so none is chosen by what others score",
                              got=word, allowed="--sweep KEY=A,B,C",
                              remedy="vlm-train train ... with these words, on one machine")  # fmt: skip
        if word.startswith("--") and word != "--watch" and not word.startswith("--config-dir"):
            close = nearest(word, ("--sweep", "--watch", "--config-dir"))
            raise ConfigError("vlm-train submit has no such option", got=word, allowed="--sweep, --watch, --config-dir",
                              remedy=close[0] if close else "vlm-train submit --help")  # fmt: skip
    return [word for word in rest if word != "--watch"], sweeps, "--watch" in rest


def _runs(words: list[str], sweeps: Sequence[str]) -> list[PlannedRun]:
    """Every run, each with its name and its place. Raises ConfigError."""
    from vlm_train.cli.planned import planned
    from vlm_train.cli.runs import choose_run
    from vlm_train.cli.sweep_values import grid, read_grid
    from vlm_train.cli.sweeps import folder_of, place, planned_of

    if not sweeps:
        run = planned(words)
        _refuse_checkpoint(run.config.run.resume)
        choose_run(run.config)
        run.config.run.resume = "auto"
        return [run]
    combinations = grid(read_grid(sweeps, words))
    runs = [planned_of(words, swept) for swept in combinations]
    folder = folder_of(runs[0].config)
    for number, (run, swept) in enumerate(zip(runs, combinations, strict=True)):
        place(run, folder, number, swept)
    _refuse_other_machines(runs)
    return runs


def _refuse_checkpoint(resume: str) -> None:
    from vlm_train.cli.runs import is_checkpoint

    if resume not in ("auto", "never") and is_checkpoint(Path(resume)):
        raise ConfigError("a job that is queued again goes on from the newest checkpoint, not from one that is named",
                          got=f"run.resume={resume}", allowed="auto, never, or a run",
                          remedy=f"run.resume={Path(resume).parent.parent}")  # fmt: skip


def _refuse_other_machines(runs: Sequence[PlannedRun]) -> None:
    """An array asks for the same machines for all of its tasks."""
    for key in ("num_nodes", "devices", "accelerator"):
        values = list(dict.fromkeys(run.config.trainer[key] for run in runs))
        if len(values) > 1:
            raise ConfigError("runs of one array have the same machines", got=f"trainer.{key}={values}",
                              allowed="one value", remedy="submit them one by one")  # fmt: skip


def _write(runs: Sequence[PlannedRun], launch: LaunchConfig) -> Path:
    """The folder of a submission with all that its job needs. Raises VlmError."""
    from vlm_train.cli import slurm_job, slurm_script
    from vlm_train.locations import in_texts, scrubbed

    first = Path(runs[0].config.run.dir)
    folder = (first if len(runs) == 1 else first.parent).absolute() / "submit" / time.strftime("%Y%m%d-%H%M%S")
    tasks = [folder / slurm_script.TASKS / f"{number:02}" for number in range(len(runs))]
    text = slurm_script.script(runs[0].config, launch, folder, tasks)
    try:
        folder.mkdir(parents=True)
        _copy_code(folder / slurm_script.CODE)
        for task, run in zip(tasks, runs, strict=True):
            slurm_job.write_task(task, run.config, run.stages, in_texts(scrubbed, run.words))
        (folder / "job.sbatch").write_text(text)
    except FileExistsError as error:
        raise VlmError("another job was written here in this second", got=folder, allowed="one a second",
                       remedy="try again") from error  # fmt: skip
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise VlmError(f"the job cannot be written: {_why(error)}", got=folder,
                       allowed="a disk with room that takes files of yours", remedy="run.dir=FOLDER elsewhere",
        ) from error  # fmt: skip
    return folder


def _why(error: OSError) -> str:
    """The reason; of the many files of a copy, that of the first."""
    told = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
    return re.sub(r"^\[Errno \d+\] ", "", str(told))


def _copy_code(folder: Path) -> None:
    """The package and what lies beside it, laid out as they are."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)
    for beside in (conf_dir(), slurm_dir()):
        if beside.parent == PACKAGE.parent:
            shutil.copytree(beside, folder / beside.name)


def _send(job: Path) -> str:
    """The number that SLURM gives to the job. Raises VlmError where it refuses."""
    from vlm_train.doctor.cluster import configuration

    sent = subprocess.run(["sbatch", "--parsable", str(job)], capture_output=True, text=True)
    if sent.returncode == 0:
        return sent.stdout.strip().partition(";")[0]
    _, why = configuration()
    if why:
        raise VlmError("SLURM is installed, but no controller answers", got=why, allowed="a login node of the cluster",
                       remedy=f"there: sbatch {shlex.quote(str(job))}")  # fmt: skip
    told = "; ".join(re.sub("^sbatch: (error: )?", "", line) for line in sent.stderr.strip().splitlines())
    raise VlmError("sbatch refused the job", got=told, allowed="what `sinfo` and the site allow",
                   remedy=f"launch.KEY=VALUE, or change {job} and send it with sbatch")  # fmt: skip
