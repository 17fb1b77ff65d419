"""What stands between the image tower and the language model: quality, tokens and time of each connector.

    python scripts/proof/connectors.py               600 and 600 steps each
    python scripts/proof/connectors.py --full        the steps of experiment=llava_tiny

The model and the two stages of experiment=llava_tiny with another connector in its place: the same tower, pictures,
batches and steps for each. The tower is that of a run of experiment=llava_tiny which is trained first (1,500 and 600
steps in the short form); connector and language model are new. Judged by exact match on held-out questions, whose
control is the same model with the next picture; the blind prior is what a reader without pictures could have. Seconds
are those of both stages' steps, one connector after the other on this machine, as two ranks of one thread.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import _runs
from _table import Row, arguments, report

from vlm_train import build
from vlm_train.schema import read_config

BAR = 20.0
"""Points of exact match that a model which sees must have above a reader without pictures, after the short form."""
SCENES = (
    "--num-samples", "20000", "--num-objects", "1-4", "--num-shapes", "3", "--num-colors", "6", "--size", "48",
    "--val-fraction", "0.02",
)  # fmt: skip
SHORT = ("stages.align.trainer.max_steps=600", "stages.instruct.trainer.max_steps=600")
SHORT_TOWER = ("stages.align.trainer.max_steps=1500", "stages.instruct.trainer.max_steps=600")
RANKS = ("trainer.devices=2", "strategy=ddp", "trainer.num_threads=1", "trainer.accelerator=cpu")
FOLDER = "vlm_train.models.connectors"
CONNECTORS = {
    "linear": [f"model.connector._target_={FOLDER}.linear.LinearConnector"],
    "mlp": [],
    "self_attention": ["model=llama3v_seed_tiny"],
    "pixel_shuffle": ["model=nano_vlm_tiny"],
    "perceiver": ["model=idefics2_tiny"],
    "qformer": [
        f"model.connector._target_={FOLDER}.qformer.QFormerConnector", "+model.connector.num_queries=16",
        "+model.connector.num_layers=2", "+model.connector.num_heads=4", "+model.connector.width=128",
    ],
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _runs.call(folder, ["data", "make", "scenes", "scenes", *SCENES], timeout=900)
        measure(folder, "tower", () if options.full else SHORT_TOWER)
        for connector, words in CONNECTORS.items():
            init = f"init={{vision: {folder / 'tower'}}}"
            found = measure(folder, connector, (*words, init, *(() if options.full else SHORT)))
            print(json.dumps({"connector": connector, **found}), flush=True)
            claim = (
                f"{connector}: exact match less the blind prior [{found['exact_match']:.1f} - {found['blind']:.1f}; "
                f"{found['tokens']} tokens an image, {found['seconds']:.0f} s]"
            )
            value, control = (found[score] - found["blind"] for score in ("exact_match", "shuffled"))
            rows.append(Row(claim=claim, value=value, bar=BAR, sense=">=", control=control))
    return report(rows, options.json)


def measure(folder: Path, name: str, words: Sequence[str]) -> dict[str, float]:
    """Scores in percent, tokens of an image, and seconds of the steps of both stages."""
    run = folder / name
    shards = [f"data.{split}.shards={folder / 'scenes' / split}" for split in ("train", "val")]
    _runs.call(folder, ["train", "experiment=llava_tiny", f"run.dir={run}", *shards, *words, *RANKS], timeout=7200)
    stages = sorted(run.glob("stage-*"))
    told = json.loads((stages[-1] / "evals" / "vqa.json").read_text())
    return {
        "exact_match": told["exact_match"],
        "shuffled": told["exact_match_shuffled_images"],
        "blind": told["text_blind_prior"],
        "tokens": build.load(stages[-1]).model.tokens_per_image,
        "seconds": sum(seconds(stage) for stage in stages),
    }


def seconds(run: Path) -> float:
    """Seconds of all steps of a run."""
    global_batch = read_config(run).trainer.global_batch
    return sum(global_batch / row["samples_per_second"] for row in _runs.rows(run))


if __name__ == "__main__":
    sys.exit(main())
