"""`vlm-train data index|verify|stats|select|convert`: what is done with shards that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from vlm_train.cli.options import Action, Ticker, arguments
from vlm_train.errors import ConfigError

_SHOWN = 20
_MODES = ("fast", "full", "sample")


def _index(words: list[str]) -> None:
    from vlm_train.data.indexing import open_manifest

    shards, _ = arguments(words, ["SHARDS"], {}, many=True)
    manifest = open_manifest(shards, progress=Ticker("MB indexed"))
    left_out = f", {manifest.num_errors} samples left out" if manifest.num_errors else ""
    print(f"{len(manifest)} samples in {len(manifest.shards)} shards{left_out}; manifest {manifest.fingerprint[:16]}")


def _verify(words: list[str]) -> int:
    from vlm_train.data.verify import Mode, verify

    defaults: dict[str, Any] = {"--mode": "fast", "--share": 0.01, "--selection": "", "--json": ""}
    shards, options = arguments(words, ["SHARDS"], defaults, many=True)
    if options["--mode"] not in _MODES:
        raise ConfigError("no such mode", got=options["--mode"], allowed=", ".join(_MODES))
    mode = cast(Mode, options["--mode"])
    selection = Path(options["--selection"]) if options["--selection"] else None
    verdict = verify(shards, mode=mode, selection=selection, share=options["--share"], progress=Ticker("samples"))
    if options["--json"]:
        Path(options["--json"]).write_text(json.dumps(verdict.as_dict(), indent=1) + "\n")
    print(f"{verdict.num_samples} samples in {verdict.num_shards} shards, {verdict.num_left_out} left out by indexing")
    if mode != "fast":
        print(f"{verdict.num_checked} samples read and decoded")
    if verdict.highest_rate is not None:
        print(f"with 95 % confidence at most {100 * verdict.highest_rate:.2f} % of all samples cannot be used")
    for reason, count in verdict.by_reason().items():
        print(f"  {count:>8}  {reason}")
    for problem in verdict.problems[:_SHOWN]:
        print(f"  {problem.shard} {problem.key}: {problem.reason}{f' ({problem.detail})' if problem.detail else ''}")
    if len(verdict.problems) > _SHOWN:
        print(f"  and {len(verdict.problems) - _SHOWN} more; --json FILE lists all")
    return 1 if verdict.problems else 0


def _stats(words: list[str]) -> None:
    from vlm_train.cli.stats_page import lines, write_page
    from vlm_train.data.stats import statistics

    shards, options = arguments(words, ["SHARDS"], {"--out": "stats.html"}, many=True)
    found = statistics(shards)
    print("\n".join(lines(found)))
    write_page(Path(options["--out"]), " ".join(shards), found)
    print(f"page: {options['--out']}")


def _select(words: list[str]) -> None:
    import numpy as np

    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.select import select_rows

    shards, options = arguments(words, ["SHARDS"], {"--where": "", "--weight": "", "--out": ""}, many=True)
    _need(options, "--out")
    if not (options["--where"] or options["--weight"]):
        raise ConfigError("nothing is selected", allowed="--where CONDITION, --weight EXPRESSION, or both")
    manifest = open_manifest(shards, progress=Ticker("MB indexed"))
    selection = select_rows(
        manifest.parts,
        np.diff(manifest.starts),
        manifest=manifest.fingerprint,
        where=options["--where"] or None,
        weight=options["--weight"] or None,
    )
    selection.save(options["--out"])
    kept = selection.content.num_kept()
    print(
        f"{kept} of {len(manifest)} samples are kept, {len(selection)} in an epoch; data.selection={options['--out']}"
    )


def _convert(words: list[str]) -> None:
    from vlm_train.data.convert import convert

    defaults: dict[str, Any] = {"--out": "", "--selection": "", "--max-samples": 10_000}
    shards, options = arguments(words, ["SHARDS"], defaults, many=True)
    _need(options, "--out")
    done = convert(
        shards,
        Path(options["--out"]),
        selection=Path(options["--selection"]) if options["--selection"] else None,
        max_samples=options["--max-samples"],
        progress=Ticker("samples"),
    )
    print(f"{options['--out']}: {done.num_written} samples, {done.num_bytes / 1e6:.1f} MB")
    if done.num_pixels:
        print(f"{done.num_pixels} images are stored as pixels: FFCV decodes upright RGB JPEG alone")
    if done.num_errors:
        print(f"{done.num_errors} samples could not be converted: {done.errors}")


def _need(options: dict[str, Any], *names: str) -> None:
    for name in names:
        if not options[name]:
            raise ConfigError(f"{name} is missing", allowed=f"{name} ...", remedy="vlm-train data --help")


ACTIONS: dict[str, Action] = {
    "index": _index,
    "verify": _verify,
    "stats": _stats,
    "select": _select,
    "convert": _convert,
}
