"""The measuring of `vlm-train evaluate`, in one process or on several ranks: `python -m vlm_train.cli.measure JOB`.

Every rank embeds its share; the first of them prints and writes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vlm_train.cli.launcher import launch
from vlm_train.cli.rank import run_rank
from vlm_train.cli.tables import describe
from vlm_train.locations import in_texts, scrubbed
from vlm_train.log import get_logger

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.engine.evaluation import EvaluationSuite
    from vlm_train.engine.rundir import RunDirectory

LOG = get_logger(__name__)
Results = dict[str, dict[str, Any]]
_JOB, _CONFIG = "job.json", "config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is measured and where the result goes; plain, so that it can be handed to ranks.

    `device`: as torch spells it; of several ranks each takes the GPU of its number. `out`: a file for the result, None
    for none. `is_own`: the run's own evaluation of its newest checkpoint, which its records get. `overrides`: the words
    that make it another one.
    """

    run: str
    checkpoint: str
    device: str
    out: str | None
    is_own: bool
    overrides: list[str]


def start(job: Job, config: DictConfig, num_ranks: int) -> int:
    """Measures, here or on ranks of its own. Returns the exit code."""
    if num_ranks == 1:
        _measure(job, config)
        return 0
    from omegaconf import OmegaConf

    with TemporaryDirectory(prefix="vlm-train-evaluate-") as folder:
        (Path(folder) / _JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
        (Path(folder) / _CONFIG).write_text(OmegaConf.to_yaml(config), encoding="utf-8")
        return launch([folder], num_ranks, module=__name__)


def main(arguments: list[str]) -> None:
    """What each rank runs."""
    import torch
    from omegaconf import DictConfig, OmegaConf

    from vlm_train.distributed import collectives

    folder = Path(arguments[0])
    job = Job(**json.loads((folder / _JOB).read_text(encoding="utf-8")))
    config = OmegaConf.load(folder / _CONFIG)
    assert isinstance(config, DictConfig)
    local = int(os.environ["LOCAL_RANK"])
    if job.device == "cuda":
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    with collectives.group(job.device):
        _measure(job, config)


def _measure(job: Job, config: DictConfig) -> None:
    import torch

    from vlm_train import build
    from vlm_train.engine import checkpoints
    from vlm_train.engine.rundir import RunDirectory

    run, checkpoint = RunDirectory(job.run), Path(job.checkpoint)
    placement, device = build.Placement.from_environment(), torch.device(job.device)
    parts = build.load(run.path, checkpoint=checkpoint, config=config)
    suite = build.evaluation_suite(parts, placement)
    LOG.info("evaluating %s on %s", checkpoint, device)
    results = suite.run(parts.model.to(device), device)
    if placement.rank > 0:
        return
    step = checkpoints.step_of(checkpoint.resolve())
    for name, result in results.items():
        print("\n".join(["", *describe(name, {**result, "step": step})]))
    if job.is_own:
        _record(run, config, suite, results, step)
        print(f"\nwritten: {run.evals}\nreport: {run.report}")
    else:
        _write(results, job)


def _record(run: RunDirectory, config: DictConfig, suite: EvaluationSuite, results: Results, step: int) -> None:
    """Records, pictures and report as training itself would have left them."""
    from omegaconf import OmegaConf

    from vlm_train.data.gallery import ShardGallery
    from vlm_train.engine.callbacks.evaluate import keep_pictures, record
    from vlm_train.engine.callbacks.pictures import draw_examples, retrieval_examples
    from vlm_train.engine.report import write_report
    from vlm_train.engine.rundir import read_lines, write_atomic

    others = [row for row in read_lines(run.history) if row["step"] != step or row["name"] not in results]
    write_atomic(run.history, "".join(json.dumps(row) + "\n" for row in others))
    record(run, step, results)
    keep_pictures(run, suite)
    examples = retrieval_examples(suite)
    if examples is not None:
        data: Any = OmegaConf.to_container(config.data)
        draw_examples(run, examples, ShardGallery(shards=data["val"]["shards"]).pixels, step=step)
    write_report(run)


def _write(results: Results, job: Job) -> None:
    if job.out is None:
        print("\nnot written: this is not the run's own evaluation of its newest checkpoint; out=FILE keeps it")
        return
    document = {"checkpoint": job.checkpoint, "overrides": in_texts(scrubbed, job.overrides), "results": results}
    Path(job.out).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {job.out}")


if __name__ == "__main__":
    run_rank(main, sys.argv[1:])
