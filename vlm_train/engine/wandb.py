"""Weights & Biases as a mirror of a run's folder: whatever the folder tells, once, under the run's own id.

Online each row goes there as it is written; a run that is resumed goes on in the same W&B run, and steps that this has
already are not sent again. Offline nothing is sent while the run trains, for W&B writes a file for each process that
cannot be joined to one run: at the end the whole folder is written as one offline run, and `vlm-train sync` does the
same at any time, online or offline.

Beside the rows go the scores of evaluations, the pictures, and alerts on what a person should know of.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_train.engine.rundir import RunDirectory, read_lines
from vlm_train.engine.wandb_files import id_of, publish, scratch
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

WORDS_OF_TRAIN = {"project": "logger.project=NAME", "offline": "logger.mode=offline, or logger=none"}
"""How a user of `vlm-train train` says which project, and that nothing is to be sent."""


def begin(
    run: RunDirectory,
    *,
    project: str,
    entity: str | None,
    mode: str,
    run_id: str,
    config: Mapping[str, Any],
    words: Mapping[str, str] = WORDS_OF_TRAIN,
) -> Any:
    """The W&B run.

    Args:
        run: its folder holds W&B's files.
        project, entity: where the run belongs.
        mode: `online` or `offline` (one folder wandb/offline-run-*, which `wandb sync` uploads).
        run_id: our id; W&B's is the same where it can be, see `id_of`.
        config: shown beside the curves.
        words: how a user says what a remedy asks for.

    Raises:
        ConfigError: W&B cannot be reached, has no login, or does not take what it is told.
    """
    import wandb
    from pydantic import ValidationError

    is_online, where = mode == "online", f"project={project}" + (f" entity={entity}" if entity else "")
    _forget_empty_variables()
    try:
        asked = _settings(project, entity, run_id, is_online=is_online)
    except (wandb.errors.UsageError, ValidationError) as error:
        raise _refused(error, where, words["project"]) from error
    try:
        (run.path / "wandb").mkdir(exist_ok=True)
        asked.root_dir = str(run.path if is_online else scratch(run))
        return wandb.init(settings=asked, config=dict(config))
    except ValidationError as error:  # of the environment, for what we ask for has been taken
        names = [f"WANDB_{str(wrong['loc'][0]).upper()}" for wrong in error.errors()]
        got = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise _refused(error, got, f"unset {' '.join(names)}") from error
    except (wandb.errors.Error, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # of the disk, and of no server
            raise _refused(error, error.filename, f"make {run.path}/wandb a folder that can be written") from error
        asks_for_login = isinstance(error, wandb.errors.UsageError | wandb.errors.AuthenticationError)
        remedy = "`wandb login`" if asks_for_login else "mend what it says"
        raise _refused(error, where, f"{remedy}, or {words['offline']}") from error


def _settings(project: str, entity: str | None, run_id: str, *, is_online: bool) -> Any:
    import wandb

    return wandb.Settings(
        project=project,
        entity=entity,
        mode="online" if is_online else "offline",
        run_id=id_of(run_id),
        run_name=run_id,
        resume="allow" if is_online else None,
        silent=True,
        console="off",
    )


def _forget_empty_variables() -> None:
    """To W&B an empty text is a value, and a wrong one; to everybody else it says nothing."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]


def _refused(error: Exception, got: object, remedy: str) -> ConfigError:
    why = " ".join(str(error).split(" For further information")[0].split())
    return ConfigError(f"Weights & Biases did not start: {why}", got=got, remedy=remedy)


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
        events = list(read_lines(self.run.events, "event"))
        for event in events[self._told :]:
            alert(self.there, event)
        self._told = len(events)
        scores = scores_by_step(self.run)
        for step in sorted(scores.keys() - self._scores.keys()):
            # W&B takes no row of a step behind the newest: the step of a score is a column of its own
            self.there.log({**scores[step], "eval/step": step})
        self._scores = scores


def replay(run: RunDirectory, there: Any, progress: Callable[[int, int], None] | None = None) -> int:
    """Sends all of a run's folder that the W&B run does not have, and ends this; returns how many rows. `progress`: of
    (rows done, in all). Raises VlmError where a record cannot be read, or an offline run cannot be written."""
    made = Path(there.dir).parent if there.offline else None
    try:
        num = _send(run, there, progress)
    finally:
        _finish(there)
    if made is not None:
        publish(run, made, there.id, num)
    return num


def _send(run: RunDirectory, there: Any, progress: Callable[[int, int], None] | None) -> int:
    rows, scores = list(read_lines(run.metrics, "step")), scores_by_step(run)
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
        there.log(pictures_of(run), step=rows[-1]["step"])
    return num


def scores_by_step(run: RunDirectory) -> dict[int, dict[str, float]]:
    """step -> {eval/NAME/...: score} of evals/history.jsonl."""
    scores: dict[int, dict[str, float]] = {}
    for row in read_lines(run.history, "step", "name"):
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
    return sum(1 for _ in read_lines(run.events, "event"))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number of a result with its path."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(f"{name}/{key}", each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
