"""What the runs of a sweep scored, by name, and the table of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_train.cli.sweep_folder import Row
from vlm_train.cli.sweep_words import Goal
from vlm_train.cli.tables import table
from vlm_train.errors import ConfigError, nearest
from vlm_train.locations import scrubbed

if TYPE_CHECKING:
    from vlm_train.engine.rundir import RunDirectory

COLUMNS = ("loss", "lr", "grad_norm", "samples_per_second", "data_wait", "mfu")
"""Of metrics.jsonl in every run; an objective has further ones."""


def measured(run: RunDirectory) -> tuple[int, dict[str, float]]:
    """(the last step, its numbers and the newest scores by name); of a run in stages those of its last one."""
    from vlm_train.cli.trained import last_stage
    from vlm_train.engine.rundir import read_lines
    from vlm_train.engine.scores import scores_of

    run = last_stage(run)
    last: dict[str, Any] = {}
    for last in read_lines(run.metrics):  # noqa: B007 - the last one is what is wanted
        pass
    found = {name: value for name, value in last.items() if name not in ("step", "samples")}
    for path in sorted(run.evals.glob("*.json")):
        scores = scores_of(json.loads(path.read_text(encoding="utf-8")))
        found |= {".".join(filter(None, (path.stem, score.group, score.metric))): score.value for score in scores}
    numbers = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    return last.get("step", 0), {name: value for name, value in numbers.items() if math.isfinite(value)}


def check_goal(goal: Goal, evaluators: Sequence[str]) -> None:
    """Refuses, before anything is trained, a score of what is not evaluated. Raises ConfigError."""
    if "." in goal.metric and goal.metric.partition(".")[0] not in evaluators:
        raise _unknown(goal, [*(f"{name}.GROUP.SCORE" for name in evaluators), *COLUMNS])


def check_measured(goal: Goal | None, rows: Sequence[Row]) -> None:
    """Refuses a goal that no finished run has a number for. Raises ConfigError."""
    finished = [row for row in rows if row.state == "finished"]
    if goal is not None and finished and best(rows, goal) is None:
        raise _unknown(goal, [name for row in finished for name in row.metrics])


def _unknown(goal: Goal, known: Sequence[str]) -> ConfigError:
    option = "--maximize" if goal.is_maximum else "--minimize"
    close = nearest(goal.metric, known) or list(dict.fromkeys(known))
    return ConfigError(f"the runs do not measure {goal.metric}", got=f"{option} {goal.metric}",
                       allowed=", ".join(close), remedy=f"{option} {close[0]}; what is trained is kept")  # fmt: skip


def ranked(rows: Sequence[Row], goal: Goal) -> list[Row]:
    """The runs that have the number, best first; equal ones in their order."""
    sign = -1.0 if goal.is_maximum else 1.0
    found = [row for row in rows if row.state == "finished" and goal.metric in row.metrics]
    return sorted(found, key=lambda row: sign * row.metrics[goal.metric])


def best(rows: Sequence[Row], goal: Goal | None) -> Row | None:
    """The run that reached the goal best, if there is one."""
    return next(iter(ranked(rows, goal)), None) if goal is not None else None


def lines(rows: Sequence[Row], goal: Goal | None, width: int) -> list[str]:
    """A row a run: values, state, last step, loss, the goal, and of the scores those that fit into `width` columns. The
    best first, then those without the number; in order where there is no goal."""
    first = ranked(rows, goal) if goal else []
    ordered = first + [row for row in rows if row not in first]
    columns = list(dict.fromkeys(["loss", *([goal.metric] if goal else [])]))
    scores = dict.fromkeys(name for row in rows for name in row.metrics if "." in name and name not in columns)
    found = _lines(ordered, columns)
    for name in scores:
        wider = _lines(ordered, [*columns, name])
        if max(map(len, wider)) > width:
            break
        columns, found = [*columns, name], wider
    return found


def _lines(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    cells = [
        [row.run.partition("-")[0], *map(scrubbed, row.swept.values()), row.state, f"{row.step:,}"]
        + [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in columns]
        for row in rows
    ]
    return table(["run", *rows[0].swept, "state", "step", *columns], cells)
