"""`python -m vlm_train.cli.slurm_job prepare|judge TASK`: what the batch script runs beside the ranks, on one node.

TASK is a folder that `vlm-train submit` wrote: the resolved config of a run, those of its stages, and the words of the
command.

`prepare` makes the run ready for its ranks, as `vlm-train train` does, and leaves TASK/next: the run to train (the
stage whose turn it is), the checkpoint to go on from, and a port for rank 0; three empty lines when all is trained.
Which checkpoint is the newest is found out here, once for all ranks. The port is one that is free on this node now: one
made of the number of the job would meet those of other jobs on the node, and one that rank 0 asks for would have to
reach the others through a shared disk, which may show them an old file for a minute.

`judge TASK CODE` says by its exit code whether a job that stopped early is to be queued again (0) or has failed (1).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli import slurm_ranks
from vlm_train.cli.launcher import free_port
from vlm_train.cli.rank import run_rank
from vlm_train.engine.requeue import Job, decide
from vlm_train.engine.rundir import RunDirectory, write_atomic
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.cli.stages import Stages

CONFIG, STAGES, COMMAND, NEXT = "config.yaml", "stages", "command.json", "next"


def main(arguments: list[str]) -> None:
    """Does what the first word says."""
    actions = {"prepare": (prepare, 2), "judge": (judge, 3)}
    action, num_words = actions.get(arguments[0] if arguments else "", (None, 0))
    if action is None or len(arguments) != num_words or not (Path(arguments[1]) / CONFIG).is_file():
        raise ConfigError("a job has a task to prepare or to judge", got=" ".join(arguments) or "none",
                          allowed="prepare TASK, judge TASK CODE", remedy="vlm-train submit ...")  # fmt: skip
    action(Path(arguments[1]), *arguments[2:])  # type: ignore[operator]


def write_task(folder: Path, config: DictConfig, stages: Stages, words: list[str]) -> None:
    """Writes what `read_task` reads."""
    from omegaconf import OmegaConf

    (folder / STAGES).mkdir(parents=True)
    write_atomic(folder / CONFIG, OmegaConf.to_yaml(config))
    for name, stage in stages.items():
        write_atomic(folder / STAGES / f"{name}.yaml", OmegaConf.to_yaml(stage))
    write_atomic(folder / COMMAND, json.dumps(words) + "\n")


def read_task(folder: Path) -> tuple[DictConfig, Stages, list[str]]:
    """The config of a run, those of its stages in order, and the words of the command."""
    from omegaconf import OmegaConf

    stages: Any = {path.stem: OmegaConf.load(path) for path in sorted((folder / STAGES).glob("*.yaml"))}
    config: Any = OmegaConf.load(folder / CONFIG)
    return config, stages, json.loads((folder / COMMAND).read_text())


def prepare(task: Path) -> None:
    """Readies what is to be trained next; see above."""
    config, stages, words = read_task(task)
    run = RunDirectory(config.run.dir)
    run.create()
    (task / NEXT).unlink(missing_ok=True)
    slurm_ranks.stop_before_training(run)
    found = _next_stage(config, stages, run, words) if stages else _next_run(config, run, words)
    lines = [str(part or "") for part in found or (None, None)]
    write_atomic(task / NEXT, "\n".join([*lines, str(free_port()) if found else "", ""]))


def judge(task: Path, code: str) -> None:
    """Ends with exit code 1 where the job is not to be queued again; see above."""
    config, _, _ = read_task(task)
    told = (task / NEXT).read_text().splitlines() if (task / NEXT).is_file() else []
    run, job = RunDirectory(told[0] if told else config.run.dir), Job.from_environment()
    assert job is not None, "the batch script says which job this is"
    if not decide(run, job, int(code)):
        raise SystemExit(1)


def _next_run(config: DictConfig, run: RunDirectory, words: list[str]) -> tuple[Path, Path | None] | None:
    """(run, checkpoint); None when it is trained."""
    from vlm_train.cli.runs import choose_run, locked, point_latest
    from vlm_train.cli.train import make_ready

    choose_run(config)  # refuses a run that was trained with another config
    if run.is_finished():
        return None
    with locked(run):
        return run.path, make_ready(config, run, None, words, lambda: point_latest(run))


def _next_stage(
    config: DictConfig, stages: Stages, run: RunDirectory, words: list[str]
) -> tuple[Path, Path | None] | None:
    """As `_next_run`, of the first stage that is not trained."""
    from omegaconf import OmegaConf

    from vlm_train.cli.runs import locked, point_latest
    from vlm_train.cli.stages import in_turn
    from vlm_train.cli.train import make_ready

    def announce() -> None:
        write_atomic(run.config, OmegaConf.to_yaml(config))
        point_latest(run)

    for stage, own in in_turn(config, stages):
        if not own.is_finished():
            with locked(own):
                return own.path, make_ready(stage, own, None, words, announce)
    if not run.is_finished():
        run.event("finished", {"stages": list(stages)})
    return None


if __name__ == "__main__":
    run_rank(main, sys.argv[1:])
