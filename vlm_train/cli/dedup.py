"""`vlm-train data dedup`: which samples of shards are duplicates of others, as a selection without them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.options import Option, arguments, choice, count, local, needed, number, out_folder, plain, whole
from vlm_train.cli.progress import Ticker
from vlm_train.cli.trained import choose_checkpoint, choose_device, open_run
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlm_train.curation.dedup import Embedded

_FINEST_EPS, _LARGEST_RADIUS, _MOST_WORKERS = 1e-6, 16, 1024
_OF_A_RUN = ("--checkpoint", "--device", "--eps", "--rule")


def deduplicate(words: list[str]) -> None:
    """Runs the action."""
    known = {
        "--out": Option(out_folder),
        "--radius": Option(whole(0, _LARGEST_RADIUS)),
        "--selection": Option(local),
        "--run": Option(plain),
        "--checkpoint": Option(plain),
        "--device": Option(plain),
        "--eps": Option(number(_FINEST_EPS, 0.999)),
        "--rule": Option(choice("paper", "leader")),
        "--num-workers": Option(count(_MOST_WORKERS)),
    }
    shards, options = arguments(words, {"SHARDS": plain}, known, many=True)
    out = needed(options, "--out", "DIR")
    _check_run(options)
    write_selection(shards, out, options)


def write_selection(shards: Sequence[str], out: Path, options: Mapping[str, Any]) -> None:
    """Finds what is a duplicate of what, writes the folder, and tells."""
    from vlm_train.curation import dedup
    from vlm_train.curation.columns import add_fingerprints
    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.selection import Selection

    manifest, chosen = open_manifest(shards, progress=Ticker("MB indexed")), options["--selection"]
    among = None if chosen is None else Selection.load(chosen, manifest.fingerprint).mask()
    add_fingerprints(manifest, num_workers=options["--num-workers"], progress=Ticker("samples"))
    embedded = None if options["--run"] is None else _embedded(options, shards)
    given = {"radius": options["--radius"], "eps": options["--eps"], "rule": options["--rule"]}
    rules = dedup.Rules(**{name: value for name, value in given.items() if value is not None})
    workers = options["--num-workers"] or len(os.sched_getaffinity(0))
    found = dedup.find_duplicates(manifest, rules, among=among, embedded=embedded, workers=workers)
    selection = dedup.save(found, out, manifest, rules, None if embedded is None else embedded.model)
    _tell(found.num_dropped(), selection.content.num_kept(), len(manifest), out)


def _check_run(options: Mapping[str, Any]) -> None:
    """Refuses settings of embeddings where no run makes any."""
    given = [name for name in _OF_A_RUN if options[name] is not None]
    if given and options["--run"] is None:
        raise ConfigError(f"{given[0]} is about embeddings, and there are none", got=f"{' '.join(given)} without --run",
                          allowed="--run RUN beside it", remedy=f"add --run RUN, or leave out {given[0]}")  # fmt: skip
    if options["--run"] is not None:  # no value suits all models
        needed(options, "--eps", "0.01")


def _embedded(options: Mapping[str, Any], shards: Sequence[str]) -> Embedded:
    """The pictures of all samples, as the run sees them."""
    import numpy as np

    from vlm_train import build
    from vlm_train.cli.walk import embed
    from vlm_train.curation.dedup import Embedded
    from vlm_train.data.sources.shards import ShardSource
    from vlm_train.engine import checkpoints

    run = open_run(options["--run"], key="--run")
    checkpoint = choose_checkpoint(run, options["--checkpoint"])
    parts = build.load(run.path, checkpoint=checkpoint)
    features, usable = embed(
        parts, ShardSource(shards=shards), choose_device(options["--device"]), by="image", num_workers=1
    )
    model = {"run": str(run.path), "checkpoint": f"{checkpoint.name}@{checkpoints.identity(checkpoint)}"}
    return Embedded(features, np.flatnonzero(usable), model)


def _tell(num_dropped: Mapping[str, int], num_kept: int, num: int, out: Path) -> None:
    said = {"exact": "have the image bytes of another", "near": "look like another", "semantic": "mean the same"}
    print(f"{num_kept} of {num} samples are kept")
    for rule, what in said.items():
        if rule in num_dropped:
            print(f"{num_dropped[rule]:>10}  {what} ({rule})")
    print(f"which of which: {out / 'duplicates.parquet'}\nnext: data.selection={out}")
