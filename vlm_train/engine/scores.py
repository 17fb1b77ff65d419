"""What an evaluator returned, as scores with their controls: the one reading of a result, for terminal and report.

A result is a dict of an evaluator: numbers, or groups of numbers (`text_to_image: {R@1: ...}`). Beside them stand what
a model that knows nothing would score (`chance`, `chance_<group>`), the `interval_95` of each score, other controls,
counts (`num_...`), and what is for a reader of the JSON: `spread`, `settings`, lists and texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NO_SCORES = ("interval_95", "spread", "settings")
_CONTROL_WORDS = ("chance", "majority", "shuffled", "blind", "prior")


@dataclass(frozen=True, slots=True)
class Score:
    """One number of a result. `group` is empty for a number that stands alone; `controls`: what others score in its
    place, by name."""

    group: str
    metric: str
    value: float
    chance: float | None
    interval: tuple[float, float] | None
    controls: Mapping[str, float]

    @property
    def name(self) -> str:
        """Group and metric as a person reads them."""
        return f"{self.group} {self.metric}".strip().replace("_", " ")


def scores_of(result: Mapping[str, Any]) -> list[Score]:
    """The scores of a result in its order."""
    found = []
    for key, value in result.items():
        if _is_control(key) or key in _NO_SCORES:
            continue
        if isinstance(value, Mapping):
            numbers = {metric: number for metric, number in value.items() if _is_number(number)}
            found += [_score(result, key, metric, number) for metric, number in numbers.items()]
        elif isinstance(value, float):
            found.append(_score(result, "", key, value))
    return found


def controls_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Controls other than chance that are one number: `majority_class`, scores of wrong labels, text-blind priors."""
    return {key: float(v) for key, v in result.items() if _is_control(key) and _is_number(v) and key != "chance"}


def cells(scores: Sequence[Score], *, interval: str) -> tuple[list[str], list[list[str]]]:
    """A table of scores: its header and its rows. `interval`: the form of a bound, such as `.2f`."""
    names = list(dict.fromkeys(name for score in scores for name in score.controls))
    rows = []
    for score in scores:
        others = [score.chance, *(score.controls.get(name) for name in names)]
        bounds = " to ".join(format(bound, interval) for bound in score.interval or ())
        rows.append([score.name, f"{score.value:.2f}", *("" if v is None else f"{v:.2f}" for v in others), bounds])
    return ["score", "chance", *(name.replace("_", " ") for name in names), "95% interval"], rows


def counts_of(result: Mapping[str, Any]) -> dict[str, int]:
    """How much was measured."""
    return {key.removeprefix("num_"): value for key, value in result.items() if key.startswith("num_")}


def _score(result: Mapping[str, Any], group: str, metric: str, value: float) -> Score:
    chance = result.get(f"chance_{group}", result.get("chance"))
    if isinstance(chance, Mapping):  # a mean over classes has the chance of the plain score
        chance = chance.get(metric, chance.get(metric.removeprefix("macro_")))
    interval = result.get("interval_95")
    if isinstance(interval, Mapping):
        interval = interval.get(group, interval)
        interval = interval.get(metric) if isinstance(interval, Mapping) else None
    elif metric != _first_number(result):  # a bare interval belongs to the evaluator's first score
        interval = None
    bounds = (float(interval[0]), float(interval[1])) if isinstance(interval, list | tuple) else None
    groups = {key: value for key, value in result.items() if _is_control(key) and isinstance(value, Mapping)}
    beside = {key: float(v[metric]) for key, v in groups.items() if metric in v and not key.startswith("chance")}
    return Score(group, metric, float(value), float(chance) if _is_number(chance) else None, bounds, beside)


def _first_number(result: Mapping[str, Any]) -> str | None:
    return next((key for key, value in result.items() if isinstance(value, float) and not _is_control(key)), None)


def _is_control(key: str) -> bool:
    return any(word in key.split("_") for word in _CONTROL_WORDS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
