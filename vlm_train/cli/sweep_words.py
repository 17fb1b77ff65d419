"""Which words of `vlm-train train` ask for a sweep, and for what; no Hydra, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_train.cli.options import count, taken
from vlm_train.errors import ConfigError, nearest

OPTIONS = ("--sweep", "--trials", "--maximize", "--minimize")
USAGE = """sweeps (independent runs, one after another, each in a folder of its own)
  --sweep KEY=A,B,C                            a run for each value; several: for each combination
  --trials N --maximize NAME | --minimize NAME a search (Optuna): N runs, each chosen by what those before it scored;
                                               beside lists it takes KEY=interval(A,B), KEY=log(A,B), KEY=int(A,B)
  --maximize NAME | --minimize NAME            alone: the table at the end with the best first. NAME is loss, another
                                               column of metrics.jsonl, or a score: retrieval.text_to_image.R@1"""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is best: the largest of a number that runs measure, or the smallest."""

    metric: str
    is_maximum: bool


@dataclass(frozen=True, slots=True)
class SweepWords:
    """What is swept over, as it was typed; `num_trials`: of a search, None for a grid."""

    sweeps: tuple[str, ...]
    num_trials: int | None
    goal: Goal | None


def split_sweep(words: Sequence[str]) -> tuple[list[str], SweepWords | None]:
    """(words of a run, what is asked of a sweep; None where nothing is). Raises ConfigError."""
    if others := [word for word in words if word in ("-m", "--multirun")]:
        raise ConfigError(f"vlm-train has no {others[0]}: what is swept over is said by its own option",
                          got=others[0], allowed="--sweep KEY=A,B,C", remedy="--sweep seed=0,1,2")  # fmt: skip
    rest, sweeps = taken(words, "--sweep")
    rest, trials = taken(rest, "--trials")
    rest, largest = taken(rest, "--maximize")
    rest, smallest = taken(rest, "--minimize")
    _refuse_options(rest)
    if not (sweeps or trials or largest or smallest):
        return rest, None
    if not sweeps:
        given = next(name for name, found in zip(OPTIONS[1:], (trials, largest, smallest), strict=True) if found)
        raise ConfigError(f"{given} is of a sweep, and nothing is swept over", got=given,
                          allowed="--sweep KEY=A,B,C beside it", remedy="--sweep seed=0,1,2")  # fmt: skip
    goals = [Goal(name, True) for name in largest] + [Goal(name, False) for name in smallest]
    if len(trials) > 1 or len(goals) > 1 or any(not goal.metric for goal in goals):
        raise ConfigError("a sweep has one number of trials and one goal", got=" ".join(words),
                          allowed="--trials N once, and one of --maximize NAME and --minimize NAME",
                          remedy="--maximize retrieval.text_to_image.R@1")  # fmt: skip
    if trials and not goals:
        raise ConfigError("a search has no goal", got=f"--trials {trials[0]}",
                          allowed="--maximize NAME or --minimize NAME beside it",
                          remedy="--maximize retrieval.text_to_image.R@1, or --minimize loss")  # fmt: skip
    num_trials = count()("--trials", trials[0]) if trials else None
    return rest, SweepWords(tuple(sweeps), num_trials, goals[0] if goals else None)


def _refuse_options(words: Sequence[str]) -> None:
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and name != "--config-dir":
            known = (*OPTIONS, "--config-dir")
            close = nearest(name, known)
            raise ConfigError("vlm-train train has no such option", got=word, allowed=", ".join(known),
                              remedy=close[0] if close else "vlm-train train --help")  # fmt: skip
