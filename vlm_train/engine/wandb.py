"""Weights & Biases as a mirror of a run's folder: whatever the folder tells, once, under the run's own id.

Online each row goes there as it is written; a run that is resumed goes on in the same W&B run, and steps that this has
already are not sent again. Offline nothing is sent while the run trains, for W&B writes a file for each process that
cannot be joined to one run: at the end the whole folder is written as one offline run, and `vlm-train sync` does the
same at any time, online or offline.

Beside the rows go the scores of evaluations, the pictures, and alerts on what a person should know of.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlm_train.engine.rundir import RunDirectory, read_lines
from vlm_train.errors import ConfigError
from vlm_train.log import get_logger

LOG = get_logger(__name__)
LOOK_SECONDS = 30.0
"""Between two looks at events.jsonl while a run trains."""

ALERTS = {
    "rewind": ("spike", "a step was refused; the run goes on without its data"),
    "hang": ("hang", "no rank makes progress"),
    "requeue": ("requeue", "the job goes back into the queue"),
    "finished": ("finished", "the last step is done"),
}
"""Event -> title and text of the alert that it is."""


def begin(
    run: RunDirectory, *, project: str, entity: str | None, mode: str, run_id: str, config: Mapping[str, Any]
) -> Any:
    """The W&B run.

    Args:
        run: its folder holds W&B's files.
        project, entity: where the run belongs.
        mode: `online` or `offline` (one folder wandb/offline-run-*, which `wandb sync` uploads).
        run_id: our id and W&B's.
        config: shown beside the curves.

    Raises:
        ConfigError: W&B cannot be reached or has no login.
    """
    import wandb

    if mode == "offline":
        for left in run.path.glob(f"wandb/offline-run-*-{run_id}"):
            shutil.rmtree(left)
    try:
        return wandb.init(
            project=project,
            entity=entity,
            mode="online" if mode == "online" else "offline",
            id=run_id,
            name=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(run.path),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.errors.Error, OSError) as error:
        raise ConfigError(
            f"Weights & Biases did not start: {error}",
            got=f"logger=wandb logger.mode={mode}",
            remedy="`wandb login`, or logger.mode=offline, or logger=none",
        ) from error


class WandbSink:
    """Takes the rows of a run that trains, in the order of their steps.

    Args:
        run: the run's folder.
        there: the W&B run.
    """

    def __init__(self, run: RunDirectory, there: Any) -> None:
        self.run, self.there = run, there
        self._next_step = int(there.step or 0)  # of a W&B run that goes on: behind its last one
        self._told, self._looked = _num_events(run), time.monotonic()
        self._scores = scores_by_step(run)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Sends a row, unless W&B has its step."""
        if row["step"] >= self._next_step:
            self.there.log(dict(row), step=row["step"])
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()

    def close(self) -> None:
        """Sends what is left; a run that stops early is not marked as crashed."""
        self._look()
        self.there.summary.update(summary_of(self.run))
        self.there.log(pictures_of(self.run), step=self.run.last_step())
        _finish(self.there)

    def _look(self) -> None:
        """Alerts, and scores at the step at which they stand."""
        self._looked = time.monotonic()
        events = list(read_lines(self.run.events))
        for event in events[self._told :]:
            alert(self.there, event)
        self._told = len(events)
        scores = scores_by_step(self.run)
        for step in sorted(scores.keys() - self._scores.keys()):
            # W&B takes no row of a step behind the newest: the step of a score is a column of its own
            self.there.log({**scores[step], "eval/step": step})
        self._scores = scores


def replay(run: RunDirectory, there: Any, progress: Callable[[int, int], None] | None = None) -> int:
    """Sends all of a run's folder that the W&B run does not have; returns how many rows. `progress`: of (rows done,
    in all)."""
    rows, scores = list(read_lines(run.metrics)), scores_by_step(run)
    first, num = int(there.step or 0), 0
    if rows and first > rows[-1]["step"] + 1:
        LOG.warning("W&B has steps up to %d, the run up to %d: it went back since", first - 1, rows[-1]["step"])
    for done, row in enumerate(rows, 1):
        if row["step"] >= first:
            there.log({**row, **_with_step(scores.get(row["step"], {}), row["step"])}, step=row["step"])
            num += 1
        if progress is not None:
            progress(done, len(rows))
    there.summary.update(summary_of(run))
    if rows:
        there.log(pictures_of(run), step=run.last_step())
    _finish(there)
    return num


def scores_by_step(run: RunDirectory) -> dict[int, dict[str, float]]:
    """step -> {eval/NAME/...: score} of evals/history.jsonl."""
    scores: dict[int, dict[str, float]] = {}
    for row in read_lines(run.history):
        result = {key: value for key, value in row.items() if key not in ("step", "name")}
        scores.setdefault(row["step"], {}).update(_numbers(f"eval/{row['name']}", result))
    return scores


def summary_of(run: RunDirectory) -> dict[str, float]:
    """The newest scores, and what else is one number of a run."""
    newest: dict[str, float] = {}
    for scores in scores_by_step(run).values():
        newest.update(scores)
    return newest


def pictures_of(run: RunDirectory) -> dict[str, Any]:
    """media/NAME: each picture of the run's folder."""
    import wandb

    return {f"media/{path.stem}": wandb.Image(str(path)) for path in sorted(run.media.glob("*.png"))}


def alert(there: Any, event: Mapping[str, Any]) -> None:
    """Sends the alert that an event is, if it is one."""
    if event["event"] in ALERTS:
        title, text = ALERTS[event["event"]]
        about = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "time"))
        there.alert(title=f"{there.id}: {title}", text=f"{text}: {about}")


def _finish(there: Any) -> None:
    """Ends the W&B run, and waits for the process that writes its file: a job may end with this one."""
    import wandb

    there.finish()
    wandb.teardown()


def _with_step(scores: Mapping[str, float], step: int) -> dict[str, float]:
    return {**scores, "eval/step": step} if scores else {}


def _num_events(run: RunDirectory) -> int:
    return sum(1 for _ in read_lines(run.events))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number of a result with its path."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(f"{name}/{key}", each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
