"""`vlm-train data calibrate`: how many copies rules find at which threshold, measured on copies of the user's own
pictures."""

from __future__ import annotations

import os
import shutil
from html import escape
from typing import TYPE_CHECKING, Any

from vlm_train.cli.curate import COMMON, alone
from vlm_train.cli.options import Option, arguments, count, needed, plain, share, whole
from vlm_train.cli.progress import Ticker
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlm_train.curation.calibration import Planted
    from vlm_train.curation.chain import Work
    from vlm_train.data.sources.shards import ShardSource

TOLERANCES = {"near": (0.25, 0.5, 1.0, 1.5, 2.0), "near without covered": (0.5, 1.0)}
EPS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
PAGE = "calibration.html"

_MOST_SAMPLES = 100_000
_LOWEST_SEED, _HIGHEST_SEED = -(2**63), 2**63 - 1


def calibrate(words: list[str]) -> None:
    """Runs the action."""
    known = {
        **{name: COMMON[name] for name in ("--out", "--num-workers", "--device")},
        "--num-samples": Option(count(_MOST_SAMPLES), 500),
        "--precision": Option(share(zero=False, one=True), 0.99),
        "--seed": Option(whole(_LOWEST_SEED, _HIGHEST_SEED), 0),
        "--run": Option(plain),
    }
    shards, options = arguments(words, {"SHARDS": plain}, known, many=True)
    needed(options, "--out", "DIR")
    if options["--device"] is not None and options["--run"] is None:
        raise ConfigError("--device is about embeddings, and there are none", got="--device without --run",
                          allowed="--run RUN beside it", remedy="add --run RUN, or leave out --device")  # fmt: skip
    with alone(options["--out"]):
        write_calibration(shards, options)


def write_calibration(shards: Sequence[str], options: Mapping[str, Any]) -> None:
    """Plants, measures, writes the folder, and tells."""
    from vlm_train.cli.calibration_page import lines
    from vlm_train.cli.models import Runs
    from vlm_train.curation.calibration import plant
    from vlm_train.curation.calibration_curves import save
    from vlm_train.curation.chain import Work
    from vlm_train.curation.engines import Local
    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.sources.shards import ShardSource

    out, workers, seed = options["--out"], options["--num-workers"], options["--seed"]
    open_manifest(shards, progress=Ticker("MB indexed"))
    source, engine = ShardSource(shards=shards), Local(num_workers=workers)
    if options["--run"] is not None:
        Runs(engine, store=out, device=None, ticking=Ticker).identity(options["--run"])  # refused before any work
    folder = out / ".planted"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed command left
    folder.mkdir(parents=True)
    work = Work(
        engine=engine,
        num_threads=workers or len(os.sched_getaffinity(0)),
        models=Runs(engine, store=folder / "embeddings", device=options["--device"], ticking=Ticker),
        ticking=Ticker,
        folder=folder,
    )
    try:
        planted = plant(source, folder / "shards", engine=engine, num_samples=options["--num-samples"], seed=seed,
                        progress=Ticker("pictures copied"))  # fmt: skip
        rules = _measured(planted, options["--run"], work)
    finally:
        shutil.rmtree(folder)
    content = save(out, planted, rules, manifest=source.fingerprint, seed=seed, target=options["--precision"])
    _write_page(out, source, content)
    print("\n".join(lines(content)))
    print(f"\npage: {out / PAGE}")


def _measured(planted: Planted, run: str | None, work: Work) -> list[dict[str, Any]]:
    from vlm_train.curation.calibration_curves import measured
    from vlm_train.curation.dedup import NearDuplicates, SemanticDuplicates

    rules = []
    for name, tolerances in TOLERANCES.items():
        covered = name == "near"
        near = {tolerance: NearDuplicates(tolerance=tolerance, covered=covered) for tolerance in tolerances}
        rules.append(measured(planted, name, "tolerance", near, work=work))
    if run is not None:
        semantic = {eps: SemanticDuplicates(run=run, eps=eps) for eps in EPS}
        rules.append(measured(planted, "semantic", "eps", semantic, work=work))
    return rules


def _write_page(out: Path, source: ShardSource, content: dict[str, Any]) -> None:
    from vlm_train.cli.calibration_page import section
    from vlm_train.cli.curation_page import STYLE, Pictures, rows_of
    from vlm_train.curation.report import examples
    from vlm_train.data.writer import write_atomically
    from vlm_train.engine import report_page

    rows = sorted(rows_of(content))
    pictures = Pictures(dict(zip(rows, examples(source, rows), strict=True)))
    header = f'<div class="brand">vlm-train data calibrate</div><h1>{escape(out.resolve().name)}</h1>'
    body = [STYLE, section(content, pictures.pair)]
    write_atomically(out / PAGE, report_page.page(out.resolve().name, header, body, ""))
