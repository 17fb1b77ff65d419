"""`vlm-train data balance`: a selection in which what captions speak of often is held down, and what is rare stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_train.cli import curate
from vlm_train.cli.options import Option, arguments, choice, count, local, needed, number, plain, share, whole
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlm_train.curation.chain import Step

_MOST_CAPTIONS = 1e12
_HIGHEST_SEED = 2**63 - 1


def balance(words: list[str]) -> None:
    """Runs the action."""
    known = {
        **{name: option for name, option in curate.COMMON.items() if name != "--device"},  # no model has a say here
        "--entries": Option(local),
        "--min-count": Option(count()),
        "--t": Option(number(1, _MOST_CAPTIONS)),
        "--keep": Option(share(zero=False, one=False)),
        "--unmatched": Option(choice("drop", "keep")),
        "--seed": Option(whole(0, _HIGHEST_SEED)),
    }
    shards, options = arguments(words, {"SHARDS": plain}, known, many=True)
    needed(options, "--out", "DIR")
    _check_one(options, "--entries", "--min-count", "--min-count 20")
    _check_one(options, "--t", "--keep", "--keep 0.5")
    curate.write_selection(shards, lambda: _steps(options), {**options, "--device": None})


def _check_one(options: Mapping[str, Any], first: str, second: str, example: str) -> None:
    given = [f"{name} {options[name]}" for name in (first, second) if options[name] is not None]
    if len(given) != 1:
        remedy = f"leave out {second}" if given else f"add {example}"
        raise ConfigError(f"either {first} or {second} is given", got=" ".join(given) or "neither",
                          allowed="one of them", remedy=remedy)  # fmt: skip


def _steps(options: Mapping[str, Any]) -> dict[str, Step]:
    from vlm_train.curation.balance import Balance

    given = curate.given(options, "--min-count", "--t", "--keep", "--unmatched", "--seed")
    entries = None if options["--entries"] is None else str(options["--entries"])
    return {"balance": Balance(entries=entries, **given)}
