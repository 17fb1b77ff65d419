"""A judge throws out captions that are false and keeps those that are true: the filter of CapFilt on scenes.

    python scripts/proof/recaption.py          about two minutes on one core
    python scripts/proof/recaption.py --full   three seeds

Of 600 scenes half have the captions of another scene (CapFilt: arXiv 2201.12086). A small contrastive model that has
learned from other scenes, whose captions are true, scores every caption with `vlm-train data recaption`, and so it does
those of a model that has hardly learned to write. The truth is known. Controls: nothing thrown out, and as many
captions kept by chance.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

import _runs
import pyarrow.parquet as pq
from _table import Row, arguments, report

from vlm_train.data.scenes.make import Variant, make_scenes
from vlm_train.data.scenes.world import World

MIN_SCORE = "0.7"
NUM_NOISY = 600
SMALL_WORLD = ["--num-objects", "1", "--num-shapes", "3", "--num-colors", "6", "--size", "32", "--val-fraction", "0.05"]
JUDGE = (
    "trainer.max_steps=2500", "schedule.warmup_steps=100", "optim.lr=2e-3", "trainer.global_batch=64",
    "checkpoint.every_steps=2500", "evaluation=none", "trainer.accelerator=cpu", "data.num_workers=0",
)  # fmt: skip
REPLACED = ("schedule.warmup_steps=5", "trainer.global_batch=24", "evaluation=retrieval")
WRITER = (
    "train", "model=llava_tiny", "objective=next_token", "data=scenes", "data.template=chatml", "evaluation=none",
    "trainer.max_steps=1", "schedule.warmup_steps=0", "trainer.global_batch=8", "model.vision.image.size=32",
    "trainer.accelerator=cpu", "data.num_workers=0",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as name:
        scores = [judged(Path(name) / str(seed), seed) for seed in range(3 if options.full else 1)]
    true, precision, recall, kept, written = (statistics.mean(column) for column in zip(*scores, strict=True))
    rows = [
        Row(claim="original captions kept, share that is true", value=precision, bar=0.9, sense=">=", control=true),
        Row(claim="true original captions, share that is kept", value=recall, bar=0.95, sense=">=", control=kept),
        Row(
            claim="captions of a model that knows nothing, share kept", value=written, bar=0.1, sense="<=", control=1.0
        ),
    ]
    return report(rows, options.json)


def judged(folder: Path, seed: int) -> tuple[float, float, float, float, float]:
    """Of the original captions the share that is true, of those kept the same, of the true ones the share kept, of all
    the share kept; of the new ones the share kept."""
    folder.mkdir()
    _runs.call(folder, ["data", "make", "scenes", "clean", "--num-samples", "6000", "--seed", "1", *SMALL_WORLD])
    half = Variant(corruption={"caption_mismatch": 0.5}, world=World(num_shapes=3, num_colors=6, fewest=1, most=1))
    make_scenes(folder / "noisy", num_samples=NUM_NOISY, seed=100 + seed, size=32, val_fraction=0.0, variant=half)
    words = [word for word in _runs.train_words(folder / "clean") if word not in REPLACED]
    _runs.call(folder, [*words, *JUDGE, "run.dir=judge", f"seed={seed}"], timeout=1800)
    shards = ["data.train.shards=clean/val", "data.val.shards=clean/val"]
    _runs.call(folder, [*WRITER, *shards, "run.dir=writer"], timeout=600)
    models = ["--run", "writer", "--scorer", "judge", "--min-score", MIN_SCORE]
    recaption = ["data", "recaption", "noisy/train", *models, "--max-tokens", "16", "--device", "cpu", "--out", "table"]
    print(_runs.call(folder, recaption, timeout=600), flush=True)
    return measured(folder)


def measured(folder: Path) -> tuple[float, float, float, float, float]:
    facts = json.loads((folder / "table" / "provenance.json").read_text())
    captions = _runs.truth_of(folder / "noisy" / "train")
    truth = {(uid, text): text in true for uid, (own, true) in captions.items() for text in own}
    rows = [
        row for path in sorted((folder / "table").glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    kept = {
        (row["uid"], text)
        for row in rows
        for text, source in zip(row["captions"], row["caption_source"], strict=True)
        if source == "original"
    }
    true = {key for key, is_true in truth.items() if is_true}
    new = facts["num_synthetic"] + facts["num_synthetic_dropped"]
    both = len(kept & true)
    shares = both / len(kept), both / len(true), len(kept) / len(truth), facts["num_synthetic"] / new
    return len(true) / len(truth), *shares


if __name__ == "__main__":
    sys.exit(main())
