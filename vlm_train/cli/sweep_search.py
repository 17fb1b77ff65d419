"""The values of the next run: of a grid those whose turn it is, of a search what Optuna's TPE sampler makes of the runs
before (Bergstra et al. 2011; Optuna, Akiba et al. 2019).

A suggestion is a function of the config's seed, the number of the run, and what the earlier runs scored: the sampler is
made anew for each, from a seed of its own. So a search that was killed goes on as if it had not been, where its runs
score the same (with the same release of Optuna), and Optuna keeps no file: its study is made of the rows of sweep.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vlm_train.cli.sweep_folder import Row
from vlm_train.cli.sweep_values import Choices, Range, Swept, grid, samples
from vlm_train.cli.sweep_words import Goal
from vlm_train.errors import ConfigError

_TRIES = 1000  # to find values that no run has had yet, after TPE's own suggestion


class Chooser(Protocol):
    """What each run of a sweep is given.

    Attributes:
        num_runs: how many there are.
        over: states of a run that is not trained again.
        samples: what a config must take so that all runs can be trained.
    """

    num_runs: int
    over: tuple[str, ...]
    samples: list[Swept]

    def choose(self, number: int, rows: Sequence[Row], seed: int) -> Swept:
        """The values of run `number`, after `rows`; `seed`: of the config."""


class Grid:
    """Every combination, in order."""

    def __init__(self, values: Sequence[Choices]) -> None:
        self.samples = grid(values)
        self.num_runs = len(self.samples)
        self.over: tuple[str, ...] = ("finished",)

    def choose(self, number: int, rows: Sequence[Row], seed: int) -> Swept:
        """See `Chooser`."""
        return self.samples[number]


class Search:
    """A search for what scores best.

    Args:
        values: what is swept over.
        num_trials: how many runs.
        goal: what is best.

    Raises:
        ConfigError: Optuna is not installed, or there are fewer combinations than runs.
    """

    def __init__(self, values: Sequence[Choices | Range], num_trials: int, goal: Goal) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError("a search needs Optuna, which is not installed", got=f"--trials {num_trials}",
                              allowed="a grid without it: --sweep KEY=A,B,C",
                              remedy="pip install 'vlm-train[sweep]'") from None  # fmt: skip
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        most = math.prod(_count(value) for value in values)
        if num_trials > most:
            raise ConfigError("there are fewer combinations than trials", got=f"--trials {num_trials}",
                              allowed=f"at most {most:.0f}",
                              remedy="leave out --trials: a run for each combination")  # fmt: skip
        self.values, self.num_runs, self.goal = list(values), num_trials, goal
        self.samples = samples(values)
        self.over: tuple[str, ...] = ("finished", "failed")  # one that failed is told as failed
        self._distributions = {value.key: _distribution(value) for value in values}

    def choose(self, number: int, rows: Sequence[Row], seed: int) -> Swept:
        """See `Chooser`. Values that an earlier run has had are drawn anew, at random."""
        import optuna

        study = self._study(rows)
        known = [row.swept for row in rows]
        for attempt in range(1 + _TRIES):
            own = int(np.random.SeedSequence([seed % 2**64, number, attempt]).generate_state(1)[0])
            samplers = optuna.samplers
            study.sampler = samplers.RandomSampler(seed=own) if attempt else samplers.TPESampler(seed=own)
            drawn = study.ask(self._distributions).params
            swept = {value.key: _text(value, drawn[value.key]) for value in self.values}
            if swept not in known:
                break
        return swept

    def _study(self, rows: Sequence[Row]) -> Any:
        """What the runs were given and what they scored."""
        import optuna

        study = optuna.create_study(direction="maximize" if self.goal.is_maximum else "minimize")
        for row in rows:
            score = row.metrics.get(self.goal.metric) if row.state == "finished" else None
            state = optuna.trial.TrialState.FAIL if score is None else optuna.trial.TrialState.COMPLETE
            params = {value.key: _value(value, row.swept[value.key]) for value in self.values}
            study.add_trial(
                optuna.trial.create_trial(state=state, value=score, params=params, distributions=self._distributions)
            )
        return study


def _count(value: Choices | Range) -> float:
    if isinstance(value, Choices):
        return len(value.texts)
    return value.high - value.low + 1 if value.kind == "int" else math.inf


def _distribution(value: Choices | Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(value, Choices):
        return CategoricalDistribution(value.texts)
    if value.kind == "int":
        return IntDistribution(int(value.low), int(value.high))
    return FloatDistribution(value.low, value.high, log=value.kind == "log")


def _text(value: Choices | Range, drawn: Any) -> str:
    return drawn if isinstance(value, Choices) else value.text(drawn)


def _value(value: Choices | Range, text: str) -> Any:
    return text if isinstance(value, Choices) else value.value(text)
