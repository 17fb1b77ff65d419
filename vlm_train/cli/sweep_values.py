"""What a sweep runs over: `KEY=A,B,C` as Hydra's grammar reads it, and the ranges of a search.

`KEY=interval(A,B)` is any number from A to B, `KEY=log(A,B)` one whose logarithm is drawn evenly, `KEY=int(A,B)` a
whole one, the ends included.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_train.checks.values import said
from vlm_train.cli.overrides import alternatives, read, split_config_dir
from vlm_train.errors import ConfigError

DIGITS = 6  # of a number that is drawn: what is trained, told and read is the same short number
_KINDS = ("interval", "log", "int")
_FORMS = "KEY=A,B,C; in a search also KEY=interval(0.1,0.9), KEY=log(1e-5,1e-3), KEY=int(1,8)"

Swept = dict[str, str]
"""Key -> the text of its value, of one run."""


@dataclass(frozen=True, slots=True)
class Choices:
    """One of several values. `key` as it was typed, with a `+`; `texts`: of the values."""

    key: str
    texts: tuple[str, ...]

    def samples(self) -> tuple[str, ...]:
        """Those that a config must take: all."""
        return self.texts


@dataclass(frozen=True, slots=True)
class Range:
    """A number from `low` to `high`, both included; `kind`: one of interval, log, int."""

    key: str
    kind: str
    low: float
    high: float

    def text(self, value: float) -> str:
        """A drawn number as a word of the command line: with 6 digits, and within the range."""
        if self.kind == "int":
            return str(int(value))
        return repr(min(max(float(f"{value:.{DIGITS}g}"), float(self.low)), float(self.high)))

    def value(self, text: str) -> float:
        """The number of such a text."""
        return int(text) if self.kind == "int" else float(text)

    def samples(self) -> tuple[str, ...]:
        """Those that a config must take: the ends, and one between."""
        middle = math.sqrt(self.low * self.high) if self.kind == "log" else self.low + (self.high - self.low) / 2
        return tuple(dict.fromkeys(map(self.text, (self.low, middle, self.high))))


def read_grid(texts: Sequence[str], words: Sequence[str]) -> list[Choices]:
    """As `read_sweeps`, where nothing is searched. Raises ConfigError also for a range."""
    values = read_sweeps(texts, words)
    for value, text in zip(values, texts, strict=True):
        if isinstance(value, Range):
            raise ConfigError("a range has no list of values to run over: it is searched", got=f"--sweep {said(text)}",
                              allowed="--sweep KEY=A,B,C; ranges in a search of vlm-train train, with --trials",
                              remedy="vlm-train train ... --trials 20 --minimize loss")  # fmt: skip
    return [value for value in values if isinstance(value, Choices)]


def read_sweeps(texts: Sequence[str], words: Sequence[str]) -> list[Choices | Range]:
    """What each `--sweep` says; `words`: the other words of the command.

    Raises:
        ConfigError: it says nothing, or what no run can take; a key is said twice.
    """
    values = [_read(text) for text in texts]
    given = [str(read(word).key_or_group) for word in split_config_dir(words)[0]]
    keys = [value.key.lstrip("+") for value in values]
    for number, (key, text) in enumerate(zip(keys, texts, strict=True)):
        if key in given or key in keys[:number]:
            raise ConfigError(f"{key} is said twice", got=f"--sweep {said(text)}", allowed="each key once",
                              remedy=f"leave out the other {key}=...")  # fmt: skip
        if key.partition(".")[0] == "run":
            raise ConfigError(f"a sweep names its runs itself, so {key} cannot be swept over",
                              got=f"--sweep {said(text)}", allowed="a key that says what is learned, or how fast",
                              remedy="run.id=NAME or run.dir=PATH for the whole sweep")  # fmt: skip
    return values


def grid(values: Sequence[Choices]) -> list[Swept]:
    """Every combination, the last key changing first."""
    keys = [value.key for value in values]
    return [dict(zip(keys, texts, strict=True)) for texts in itertools.product(*(value.texts for value in values))]


def samples(values: Sequence[Choices | Range]) -> list[Swept]:
    """Of a search, what its config must take: for each key its samples, beside the first ones of the others."""
    first = {value.key: value.samples()[0] for value in values}
    changes = [{value.key: text} for value in values for text in value.samples()[1:]]
    return [first, *(first | change for change in changes)]


def in_words(swept: Swept) -> list[str]:
    """The words of a run's command."""
    return [f"{key}={text}" for key, text in swept.items()]


def _read(text: str) -> Choices | Range:
    key, _, value = text.partition("=")
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", value)
    # of Hydra's functions these have values to count; int(A,B) is a cast to it, and ours a range
    if found is None or found[1] in ("choice", "range"):
        words = alternatives(text)
        return Choices(words[0].partition("=")[0], tuple(word.partition("=")[2] for word in words))
    if found[1] not in _KINDS:
        raise ConfigError(f"there is no {found[1]}(...) to sweep over", got=said(text), allowed=_FORMS,
                          remedy=f"{key}=interval(A,B), or {key}=log(A,B)")  # fmt: skip
    return _range(key, found[1], found[2].split(","), text)


def _range(key: str, kind: str, ends: Sequence[str], text: str) -> Range:
    try:
        low, high = (int(end) if kind == "int" else float(end) for end in ends)
    except ValueError:  # no number, or not two
        low = high = math.nan
    limit = 2.0**53 if kind == "int" else math.inf  # beyond it not every whole number is a float
    if not ((0.0 if kind == "log" else -limit) < low < high < limit):
        whole, above = "whole " if kind == "int" else "", " above 0" if kind == "log" else ""
        raise ConfigError(f"{kind}(...) is no range", got=said(text),
                          allowed=f"{kind}(A,B): two {whole}numbers{above}, the smaller first",
                          remedy=_FORMS.partition("also ")[2])  # fmt: skip
    if not re.fullmatch(r"\+{0,2}[\w.]+", key):
        raise ConfigError("a range is of one key", got=said(text), allowed=_FORMS, remedy="optim.lr=log(1e-5,1e-3)")
    return Range(key, kind, low, high)
