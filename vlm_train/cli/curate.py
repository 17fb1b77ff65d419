"""What the verbs of curation share: steps run one after another, over shards, into the folder of a selection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli import engines
from vlm_train.cli.options import Option, local, out_folder, plain
from vlm_train.cli.progress import Ticker
from vlm_train.cli.tables import table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vlm_train.curation.chain import Step

COMMON = {
    "--out": Option(out_folder),
    "--selection": Option(local),
    "--device": Option(plain),
    **engines.OPTIONS,
}
"""The options of every verb of curation."""


def given(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The options `names` that have a value, as a step calls them: `max_side` of --max-side."""
    return {name.strip("-").replace("-", "_"): options[name] for name in names if options[name] is not None}


def write_selection(
    shards: Sequence[str], steps: Callable[[], Mapping[str, Step]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Runs a chain of steps, writes the folder, and tells; returns what provenance.json says of each step."""
    from vlm_train.cli.models import Runs
    from vlm_train.curation.chain import Work, run_chain
    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.selection import Selection

    chain, out, cores = steps(), options["--out"], len(os.sched_getaffinity(0))
    with engines.opened(options, out) as engine:
        manifest, chosen = open_manifest(shards, progress=Ticker("MB indexed")), options["--selection"]
        among = None if chosen is None else Selection.load(chosen, manifest.fingerprint)
        work = Work(
            engine=engine,
            num_threads=min(options["--num-workers"] or cores, cores),
            models=Runs(engine, store=out / "embeddings", device=options["--device"], ticking=Ticker),
            ticking=Ticker,
            folder=out,
        )
        selection = run_chain(manifest, chain, work=work, among=among)
    told: list[dict[str, Any]] = selection.provenance["steps"]
    _tell(told, selection.content.num_kept(), len(manifest), out)
    return told


def _tell(steps: Sequence[Mapping[str, Any]], num_kept: int, num: int, out: Path) -> None:
    """Prints what each rule of each step dropped."""
    cells = [
        [step["step"], rule, f"{dropped:,}", f"{100 * dropped / max(1, step['num_before']):.1f} %"]
        for step in steps
        for rule, dropped in (step["num_dropped"] or {"": 0}).items()
    ]
    print("\n".join(table(["step", "rule", "dropped", "of those before"], cells, left=2)))
    print(f"{num_kept:,} of {num:,} samples are kept")
    print(f"each dropped one, and why: {out / 'dropped.parquet'}\nnext: data.selection={out}")
