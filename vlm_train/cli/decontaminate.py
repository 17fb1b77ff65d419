"""`vlm-train data decontaminate`: which samples of shards are those of a benchmark too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_train.cli import curate
from vlm_train.cli.options import Option, arguments, needed, number, plain, several, whole
from vlm_train.cli.tables import table
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vlm_train.curation.chain import Step

_LARGEST_RADIUS, _MOST_WORDS = 16, 1000
_NO_TEXTS = 0


def decontaminate(words: list[str]) -> None:
    """Runs the action."""
    known = {
        **curate.COMMON,
        "--against": Option(_named, repeated=True),
        "--drop": Option(several("exact", "near", "model", "text")),
        "--radius": Option(whole(0, _LARGEST_RADIUS)),
        "--num-words": Option(whole(_NO_TEXTS, _MOST_WORDS)),
        "--run": Option(plain),
        "--min-cosine": Option(number(0.0, 1.0)),
    }
    shards, options = arguments(words, {"SHARDS": plain}, known, many=True)
    needed(options, "--out", "DIR")
    if options["--device"] is not None and options["--run"] is None:
        raise ConfigError("--device is where a model runs", got="--device without --run", allowed="--run RUN beside it",
                          remedy="add --run RUN --min-cosine 0.9, or leave out --device")  # fmt: skip
    (step,) = curate.write_selection(shards, lambda: _steps(options), options)
    _tell(step["facts"]["benchmarks"], options["--out"])


def _named(name: str, text: str) -> tuple[str, str]:
    benchmark, separator, shards = text.partition("=")
    if not (benchmark and separator and shards):
        raise ConfigError(f"{name} names a benchmark and its shards", got=text, allowed="NAME=SHARDS",
                          remedy=f"{name} coco=data/coco/val")  # fmt: skip
    return benchmark, shards


def _steps(options: Mapping[str, Any]) -> dict[str, Step]:
    from vlm_train.curation.decontaminate import Decontaminate

    against: dict[str, list[str]] = {}
    for benchmark, shards in options["--against"]:
        against.setdefault(benchmark, []).append(shards)
    settings = curate.given(options, "--drop", "--radius", "--num-words", "--run", "--min-cosine")
    if settings.get("num_words") == _NO_TEXTS:
        settings["num_words"] = None
    return {"contaminated": Decontaminate(against=against, **settings)}


def _tell(benchmarks: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """What each benchmark has in common with the samples."""
    cells = [
        [name, f"{found['num_samples']:,}", f"{found['num_hit']:,}", rule, f"{flagged:,}"]
        for name, found in benchmarks.items()
        for rule, flagged in (found["num_flagged"] or {"none": 0}).items()
    ]
    print("\n".join(table(["benchmark", "of its samples", "are here", "by the rule", "samples here"], cells)))
    print(f"which of which: {out / 'hits.parquet'}; flagged in the manifest too:\n"
          '  vlm-train data select SHARDS --where "contaminated_by IS NULL" --out DIR')  # fmt: skip
