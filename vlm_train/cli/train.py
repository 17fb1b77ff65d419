"""`vlm-train train`: compose, choose the run, prepare what ranks read, launch, and say what came out."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.paths import conf_dir, groups, headline
from vlm_train.cli.progress import Ticker
from vlm_train.cli.sweep_words import USAGE, split_sweep
from vlm_train.cli.tables import describe
from vlm_train.errors import ConfigError, VlmError
from vlm_train.log import get_logger

if TYPE_CHECKING:
    from vlm_train.cli.planned import PlannedRun
    from vlm_train.engine.rundir import RunDirectory

LOG = get_logger(__name__)
KEYS = """keys (all: vlm-train configs keys)
  trainer.max_steps trainer.global_batch       how long, how large
  trainer.devices trainer.micro_batch          on how many ranks, how much at once; never changes the result
  data.train.shards data.val.shards            a folder, a glob, 'path/{00000..00012}.tar', or a list of these
  data.selection data.num_workers              which samples count; reader processes a rank
  data.captions                                a table of new captions (vlm-train data recaption)
  optim.lr checkpoint.every_steps              peak learning rate; how often state is saved
  init=RUN|CHECKPOINT                          weights to start from; image size and context may be others
  run.id run.dir run.resume=auto|never|PATH    which run; the same command goes on with an unfinished run
  --config-dir DIR                             your own configs beside ours"""


def main(words: list[str]) -> int:
    """Runs the verb."""
    if any(word in ("-h", "--help") for word in words):
        print(usage())
        return 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "`vlm-train train` starts its own ranks", got=f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment",
            allowed="one process", remedy="vlm-train train trainer.devices=N strategy=ddp",
        )  # fmt: skip
    own_words, asked = split_sweep(words)
    if asked is not None:
        from vlm_train.cli.sweep_runs import train_all

        return train_all(own_words, asked, train_chosen)
    from vlm_train.cli.planned import planned, refuse_nodes
    from vlm_train.cli.runs import choose_run, locked

    chosen = planned(own_words)
    refuse_nodes(chosen.config)
    run, checkpoint = choose_run(chosen.config)
    with locked(run):
        return train_chosen(chosen, run, checkpoint)


def train_chosen(chosen: PlannedRun, run: RunDirectory, checkpoint: Path | None, *, apart: bool = False) -> int:
    """Trains a run that this process holds, from a checkpoint or else its newest, and says what came out; a run in
    stages, stage by stage. `apart`: it is one of several, so even a single rank has a process of its own, and others
    say what came out. Returns the exit code."""
    from vlm_train.cli.runs import point_latest

    if chosen.stages:
        return _run_stages(chosen, run, apart=apart)
    return _run(chosen.config, run, checkpoint, chosen.words, lambda: point_latest(run), apart=apart)


def usage() -> str:
    """Groups with their choices, and the keys people use most; no Hydra, no torch."""
    lines = ["usage: vlm-train train [group=choice] [key=value]", "", "  vlm-train train experiment=quickstart"]
    lines += ["  vlm-train train experiment=quickstart objective=sigmoid trainer.devices=2 strategy=ddp"]
    lines += ["  vlm-train train experiment=quickstart --sweep seed=0,1,2 --sweep optim.lr=1e-3,3e-4", "", "groups"]
    root = (conf_dir() / "train.yaml").read_text()  # other roots have groups of their own
    for group, choices in groups().items():
        if f"- {group}: " not in root:
            continue
        lines.append(f"  {group:11}{', '.join(choices)}")
    lines += ["", "experiments"]
    for name in groups().get("experiment", []):
        lines.append(f"  {name:18}{headline(conf_dir() / 'experiment' / f'{name}.yaml')}")
    return "\n".join([*lines, "", KEYS, "", USAGE])


def _run_stages(chosen: PlannedRun, run: Any, *, apart: bool) -> int:
    """Every stage that is not finished, in order; ends with the first that fails."""
    from omegaconf import OmegaConf

    from vlm_train.cli.runs import locked, point_latest
    from vlm_train.cli.stages import in_turn
    from vlm_train.engine.ledger import BEGAN
    from vlm_train.engine.rundir import write_atomic

    def announce() -> None:
        write_atomic(run.config, OmegaConf.to_yaml(chosen.config))
        point_latest(run)

    for stage, own in in_turn(chosen.config, chosen.stages):
        with locked(own):
            code = 0 if own.is_finished() else _run(stage, own, None, chosen.words, announce, apart=apart)
        if code:
            return code
        os.environ[BEGAN] = str(time.time())  # for the ledger of the next one
    if run.is_finished():
        print(f"{run.path} is finished already; run.resume=never trains it again as a new run")
    else:
        run.event("finished", {"stages": list(chosen.stages)})
    return 0


def _run(
    config: Any, run: Any, checkpoint: Path | None, words: list[str], announce: Callable[[], None], *, apart: bool
) -> int:
    """One run; `announce` is called when it is there and nothing of what it asks for has been refused; `apart`: see
    `train_chosen`."""
    from vlm_train.engine.ledger import book_the_end

    if run.is_finished() and checkpoint is None:
        print(f"{run.path} is finished already; run.resume=never trains it again as a new run")
        return 0
    checkpoint = make_ready(config, run, checkpoint, words, announce)
    if apart or config.trainer.devices > 1:
        code = _launch(config, run, checkpoint)
    else:
        from vlm_train import training

        training.train(run.path, checkpoint)
        code = 0
    book_the_end(run)
    if code == 0 and not apart:
        print(summary(run))
    return code


def _launch(config: Any, run: RunDirectory, checkpoint: Path | None) -> int:
    """Trains in ranks of their own; returns the exit code."""
    from vlm_train.cli.launcher import launch

    try:
        return launch([str(run.path), *([str(checkpoint)] if checkpoint else [])], config.trainer.devices)
    except VlmError as error:  # a rank that was killed cannot write it down itself
        run.event("failed", {"step": run.last_step(), "error": error.what})
        raise


def make_ready(
    config: Any, run: Any, checkpoint: Path | None, words: Sequence[str], announce: Callable[[], None]
) -> Path | None:
    """Once, before any rank starts: where the run goes on from, its records up to there, and what ranks read; see
    `_run`. Returns the checkpoint to go on from, `checkpoint` or else the newest; None for a run that begins."""
    from omegaconf import OmegaConf

    from vlm_train import build, origins
    from vlm_train.cli.runs import bring_back, refuse_other_config
    from vlm_train.engine import checkpoints
    from vlm_train.engine.rundir import write_atomic
    from vlm_train.locations import in_texts, scrubbed

    refuse_other_config(config, run)  # another process may have trained it since it was chosen
    checkpoint = checkpoint or checkpoints.newest(run.checkpoints) or bring_back(config, run)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    LOG.info("%s %s%s", "resuming" if step else "starting", run.path, f" after step {step}" if step else "")
    reached = run.last_step()
    if reached and not step:
        LOG.warning("its %d steps are trained again: it has no checkpoint (checkpoint.every_steps=%d)", reached,
                    config.checkpoint.every_steps)  # fmt: skip
    run.rewind(step if step else -1)  # what indexing left out stands at step 0 and is written anew
    checkpoints.retire_after(run.checkpoints, step)
    # compares the weights to start from with a model without memory
    new_towers = origins.start_as_told(build.skeleton(config)) if config.init and step == 0 else []
    build.prepare(config, run, fresh=step == 0, progress=Ticker("MB indexed"))
    # from here on the run exists: what could be refused has been
    write_atomic(run.config, OmegaConf.to_yaml(config))
    announce()
    ranks = config.trainer.devices * config.trainer.num_nodes
    told = {"step": step, "reached": reached, "command": in_texts(scrubbed, list(words)), "ranks": ranks}
    run.event("resume" if step else "start", told | ({"new_towers": new_towers} if new_towers else {}))
    return checkpoint


def summary(run: Any) -> str:
    """Where the run lies, what it measured, where its time went, and what to do next."""
    from vlm_train.engine.report_time import time_lines
    from vlm_train.schema import read_config

    lines = ["", f"trained: {run.path}"]
    for path in sorted(run.evals.glob("*.json")):
        lines += ["", *describe(path.stem, json.loads(path.read_text()))]
    if found := time_lines(run):
        lines += ["", *found]
    if run.report.exists():
        lines += ["", f"report: {run.report}"]
    answers = read_config(run.path).objective.get("_target_", "").endswith("NextToken")
    what = 'image=FILE prompt="..."' if answers else 'text="..." images=FOLDER out=grid.png'
    lines.append(f"next: vlm-train predict run={shlex.quote(str(run.path))} {what}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
