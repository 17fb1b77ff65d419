"""Curated data teaches more: a model on all samples, on those that curation keeps, and on those that are known clean.

    python scripts/proof/curation_pays.py          25 minutes on two cores: one seed
    python scripts/proof/curation_pays.py --full   three seeds

Of openmoji's drawings a fifth gets the caption of another, and half come a second time, as a smaller picture or a JPEG
of low quality, each with its caption of then. A first run learns on all of it, shortly; `data curate curation=fitting`
drops copies, and of the others the quarter that fits worst in the eyes of that run. Then `experiment=curation_pays` is
trained on all samples, on the curated ones and, which nobody can have in practice, on those that are neither copied nor
false: as many steps, batches and samples each. Judged on drawings with names that none of them has seen, by the mean
R@10 of both directions. The control of the curated set is a set of as many samples that are drawn by chance.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

import _runs
import numpy as np
from _table import Row, arguments, report
from numpy.typing import NDArray
from PIL import Image

from vlm_train.curation.calibration import recompressed, resized
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import DatasetWriter

FALSE, COPIED = 0.2, 0.5
SCORER = ("trainer.max_steps=240", "evaluation=none", "run.dir=scorer")
MACHINE = ("trainer.accelerator=cpu", "data.num_workers=1")
SHARDS = Path("data/planted/train")
SIDES = ("text_to_image", "image_to_text")
EXPERIMENT = ("train", "experiment=curation_pays", *MACHINE)


Curve = list[tuple[int, float]]
"""(step, R@10)."""


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(folder)
        _runs.call(folder, [*EXPERIMENT, *SCORER], timeout=3600)
        chain = ["data", "curate", "curation=fitting", f"shards={SHARDS}", "out=curated", "device=cpu"]
        print(_runs.call(folder, [*chain, "curation.steps.score.run=scorer"], timeout=3600), flush=True)
        sets = selections(folder)
        seeds = range(3 if options.full else 1)
        curves = {name: [learned(folder, name, seed) for seed in seeds] for name in sets}
    final = {name: statistics.mean(curve[-1][1] for curve in found) for name, found in curves.items()}
    saved = {name: statistics.mean(map(share_saved, curves["all"], found)) for name, found in curves.items()}
    print(f"{'samples':<12}{'':>8}{'copies':>9}{'false':>9}{'R@10':>8}{'steps saved':>13}")
    for name, (num, copies, false) in sets.items():
        print(f"{name:<12}{num:>8,}{copies:>9.1%}{false:>9.1%}{final[name]:>8.1f}{saved[name]:>13.0%}")
    gained = final["curated"] - final["all"]
    chance = final["by chance"] - final["all"]
    rows = [
        Row(claim="R@10, curated above all samples, points", value=gained, bar=0.0, sense=">=", control=chance),
        Row(claim="steps saved until the R@10 of all samples", value=saved["curated"], bar=0.1, sense=">=",
            control=saved["by chance"]),
    ]  # fmt: skip
    return report(rows, options.json)


def plant(folder: Path) -> None:
    """The data: key NUMBER-own or NUMBER-copy, with -false behind where the caption is another's."""
    _runs.call(folder, ["data", "import", "openmoji", "data/openmoji"], timeout=600)
    source = ShardSource(shards=str(folder / "data/openmoji/train"))
    samples = [sample for sample in source.read(np.arange(len(source))) if not isinstance(sample, Exception)]
    generator = np.random.default_rng(0)
    captions = [sample.parts["txt"] for sample in samples]
    wrong = generator.permutation(len(samples))[: round(FALSE * len(samples))]
    told = dict(zip(wrong.tolist(), (captions[row] for row in np.roll(wrong, 1)), strict=True))
    copied = set(generator.permutation(len(samples))[: round(COPIED * len(samples))].tolist())
    with DatasetWriter(folder / SHARDS.parent, parameters={}, max_samples=1000) as writer:
        for number, sample in enumerate(samples):
            caption, mark = told.get(number, captions[number]), "-false" if number in told else ""
            writer.add("train", f"{number:05d}-own{mark}", {"png": sample.parts["png"], "txt": caption})
            if number in copied:
                picture = Image.open(io.BytesIO(sample.parts["png"])).convert("RGB")
                ending, copy = ("png", resized) if generator.random() < 0.5 else ("jpg", recompressed)
                writer.add("train", f"{number:05d}-copy{mark}", {ending: copy(picture, generator), "txt": caption})
        writer.finish()


def selections(folder: Path) -> dict[str, tuple[int, float, float]]:
    """By name of a written selection: its size, and the shares of it that are copies of others in it, and false."""
    manifest = open_manifest(str(folder / SHARDS))
    keys = manifest.table(["key"])["key"].to_pylist()
    is_copy = np.array(["-copy" in key for key in keys])
    origin = np.array([int(key[:5]) for key in keys])
    is_false = np.array([key.endswith("-false") for key in keys])
    curated = Selection.load(folder / "curated", manifest.fingerprint).mask()
    drawn = np.zeros(len(keys), bool)
    drawn[np.random.default_rng(1).permutation(len(keys))[: curated.sum()]] = True
    masks = {"all": np.ones(len(keys), bool), "by chance": drawn, "curated": curated, "clean": ~(is_copy | is_false)}
    for name, mask in masks.items():
        Selection.from_mask(mask, manifest=manifest.fingerprint).save(folder / name)
    return {name: (int(mask.sum()), _twice(origin[mask]), is_false[mask].mean()) for name, mask in masks.items()}


def _twice(origin: NDArray[np.int64]) -> float:
    """The share of samples before which one of the same origin stands."""
    return 1 - len(np.unique(origin)) / len(origin)


def learned(folder: Path, name: str, seed: int) -> Curve:
    """R@10 over the steps of a run on a selection."""
    words = [*EXPERIMENT, f"data.selection={name}", f"seed={seed}", f"run.dir=runs/{name.replace(' ', '-')}-{seed}"]
    _runs.call(folder, words, timeout=7200)
    history = folder / words[-1].removeprefix("run.dir=") / "evals" / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    curve = [(row["step"], statistics.mean(row[side]["R@10"] for side in SIDES)) for row in rows if SIDES[0] in row]
    print(f"{name}, seed {seed}: " + ", ".join(f"{step} {score:.1f}" for step, score in curve), flush=True)
    return curve


def share_saved(of_all: Curve, curve: Curve) -> float:
    """The share of the steps that are left when a run is as good as that on all samples is at its end; 0 if never."""
    (last, score) = of_all[-1]
    return max((1 - step / last for step, found in curve if found >= score), default=0.0)


if __name__ == "__main__":
    sys.exit(main())
