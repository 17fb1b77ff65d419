"""Runs the evaluators between two steps, on every rank, on the weights that will be used."""

from __future__ import annotations

import json
from typing import Any

import lightning

from vlm_train.distributed import collectives
from vlm_train.engine.bad_samples import record_errors
from vlm_train.engine.evaluation import EvaluationSuite
from vlm_train.engine.rundir import RunDirectory, append_line, write_atomic
from vlm_train.evaluation.fixed_prompts import FixedPrompts
from vlm_train.log import get_logger
from vlm_train.types import Batch

LOG = get_logger(__name__)


class Evaluate(lightning.Callback):
    """Measures every `every_steps` steps (0: never in between) and after the last step.

    Args:
        run: the run's directory.
        suite: what is measured on what.
        every_steps: period.
        num_steps: the last step.
    """

    def __init__(self, *, run: RunDirectory, suite: EvaluationSuite, every_steps: int, num_steps: int) -> None:
        self.run, self.suite, self.every_steps, self.num_steps = run, suite, every_steps, num_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Evaluates if it is time to."""
        step = batch["step"] + 1
        if step != self.num_steps and not (self.every_steps and step % self.every_steps == 0):
            return
        results = self.suite.run(pl_module.evaluated_model, pl_module.device)
        num_errors = record_errors(self.run, step, "val", self.suite.errors)
        if collectives.rank() == 0:
            record(self.run, step, results)
            keep_pictures(self.run, self.suite)
        if num_errors:
            LOG.warning(
                "%d validation samples could not be read and were left out: %s", num_errors, self.run.data_errors
            )


def record(run: RunDirectory, step: int, results: dict[str, dict[str, Any]]) -> None:
    """evals/NAME.json holds the newest result of each evaluator, evals/history.jsonl all of them by step."""
    for name, result in results.items():
        write_atomic(run.evals / f"{name}.json", json.dumps({"step": step, **result}, indent=2) + "\n")
        append_line(run.history, {"step": step, "name": name, **result})


def keep_pictures(run: RunDirectory, suite: EvaluationSuite) -> None:
    """What fixed prompts are about, for the report: media/prompt-NAME.png. One that cannot be written is a warning, as
    of every picture."""
    for evaluator in suite.evaluators.values():
        for name, png in evaluator.pictures.items() if isinstance(evaluator, FixedPrompts) else ():
            try:
                (run.media / f"prompt-{name}.png").write_bytes(png)
            except OSError as error:
                LOG.warning("a picture was not written: %s", error)
