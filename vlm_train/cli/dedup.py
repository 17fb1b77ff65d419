"""`vlm-train data dedup`: which samples of shards are duplicates of others, as a selection without them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_train.cli import curate
from vlm_train.cli.options import Option, arguments, choice, needed, number, plain, whole
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlm_train.curation.chain import Step

_FINEST_EPS, _LARGEST_RADIUS, _MOST_TOLERANCE = 1e-6, 16, 10
_OF_A_RUN = ("--eps", "--rule", "--device")


def deduplicate(words: list[str]) -> None:
    """Runs the action."""
    known = {
        **curate.COMMON,
        "--radius": Option(whole(0, _LARGEST_RADIUS)),
        "--tolerance": Option(number(0, _MOST_TOLERANCE)),
        "--covered": Option(choice("yes", "no"), "yes"),
        "--run": Option(plain),
        "--eps": Option(number(_FINEST_EPS, 0.999)),
        "--rule": Option(choice("paper", "leader")),
    }
    shards, options = arguments(words, {"SHARDS": plain}, known, many=True)
    _check(options)
    curate.write_selection(shards, lambda: _steps(options), options)


def _check(options: Mapping[str, Any]) -> None:
    """Refuses settings of embeddings where no run makes any."""
    needed(options, "--out", "DIR")
    given = [name for name in _OF_A_RUN if options[name] is not None]
    if given and options["--run"] is None:
        raise ConfigError(f"{given[0]} is about embeddings, and there are none", got=f"{' '.join(given)} without --run",
                          allowed="--run RUN beside it", remedy=f"add --run RUN, or leave out {given[0]}")  # fmt: skip
    if options["--run"] is not None:  # no value suits all models
        needed(options, "--eps", "0.01")


def _steps(options: Mapping[str, Any]) -> dict[str, Step]:
    from vlm_train.curation.dedup import NearDuplicates, SemanticDuplicates

    looks = curate.given(options, "--radius", "--tolerance")
    steps: dict[str, Step] = {"copies": NearDuplicates(covered=options["--covered"] == "yes", **looks)}
    if options["--run"] is not None:
        steps["semantic"] = SemanticDuplicates(**curate.given(options, "--run", "--eps", "--rule"))
    return steps
