"""What stands between the image tower and the language model: quality, tokens and time of each connector.

    python scripts/proof/connectors.py               600 and 600 steps each
    python scripts/proof/connectors.py --full        the steps of experiment=llava_tiny

The model and the two stages of experiment=llava_tiny with another connector in its place: the same tower, pictures,
batches and steps for each. The tower is that of a run of experiment=llava_tiny which is trained first (1,500 and 600
steps in the short form); connector and language model are new. Judged by exact match on held-out questions, whose
control is the same model with the next picture; the blind prior is what a reader without pictures could have. A step is
forward and backward of a batch of 16 on one thread; all connectors take turns.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _runs
import torch
from _table import Row, arguments, report

from vlm_train import build

BAR = 10.0
"""Points of exact match that a model which sees must have above a reader without pictures: the 95 % interval of a score
is 5 to either side."""
SCENES = (
    "--num-samples", "20000", "--num-objects", "1-4", "--num-shapes", "3", "--num-colors", "6", "--size", "48",
    "--val-fraction", "0.02",
)  # fmt: skip
SHORT = ("stages.align.trainer.max_steps=600", "stages.instruct.trainer.max_steps=600")
SHORT_TOWER = ("stages.align.trainer.max_steps=1500", "stages.instruct.trainer.max_steps=600")
NUM_ROUNDS = 15
ALONE = build.Placement(rank=0, world_size=1)
RANKS = ("trainer.devices=2", "strategy=ddp", "trainer.num_threads=1", "trainer.accelerator=cpu")
FOLDER = "vlm_train.models.connectors"
CONNECTORS = {
    "linear": [f"model.connector._target_={FOLDER}.linear.LinearConnector"],
    "mlp": [],
    "self_attention": ["model=llama3v_seed_tiny"],
    "pixel_shuffle": ["model=nano_vlm_tiny"],
    "perceiver": ["model=idefics2_tiny", f"model.connector._target_={FOLDER}.perceiver.PerceiverConnector"],
    "qformer": [
        f"model.connector._target_={FOLDER}.qformer.QFormerConnector", "+model.connector.num_queries=16",
        "+model.connector.num_layers=2", "+model.connector.num_heads=4", "+model.connector.width=128",
    ],
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _runs.call(folder, ["data", "make", "scenes", "scenes", *SCENES], timeout=900)
        train(folder, "tower", () if options.full else SHORT_TOWER)
        init = f"init={{vision: {folder / 'tower'}}}"
        stages = {
            connector: train(folder, connector, (*words, init, *(() if options.full else SHORT)))
            for connector, words in CONNECTORS.items()
        }
        parts = {connector: build.load(stage) for connector, stage in stages.items()}
        times = step_times(parts)
        rows = [
            row(connector, scores(stage), parts[connector].model.tokens_per_image, times[connector])
            for connector, stage in stages.items()
        ]
    return report(rows, options.json)


def train(folder: Path, name: str, words: Sequence[str]) -> Path:
    """The last stage of a run; prints its scores."""
    run = folder / name
    shards = [f"data.{split}.shards={folder / 'scenes' / split}" for split in ("train", "val")]
    _runs.call(folder, ["train", "experiment=llava_tiny", f"run.dir={run}", *shards, *words, *RANKS], timeout=7200)
    stage = max(run.glob("stage-*"))
    print(json.dumps({"run": name, **scores(stage)}), flush=True)
    return stage


def scores(stage: Path) -> dict[str, float]:
    """In percent: with the picture, with the next one, and of a reader without pictures."""
    told = json.loads((stage / "evals" / "vqa.json").read_text())
    kinds = {"exact_match": "exact_match", "shuffled": "exact_match_shuffled_images", "blind": "text_blind_prior"}
    return {kind: told[key] for kind, key in kinds.items()}


def step_times(parts: Mapping[str, build.Parts]) -> dict[str, float]:
    """Time of forward and backward of a batch with each connector, as a multiple of the MLP's in the same round."""
    torch.set_num_threads(1)
    batches = {name: next(iter(build.train_loader(each, ALONE))) for name, each in parts.items()}
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(NUM_ROUNDS):
        for name, each in parts.items():
            start = time.perf_counter()
            each.model(batches[name])["token_hidden"].square().sum().backward()
            taken[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(own / mlp for own, mlp in zip(times, taken["mlp"], strict=True))
        for name, times in taken.items()
    }


def row(connector: str, found: Mapping[str, float], num_tokens: Any, time_of_mlp: float) -> Row:
    """A line of the table."""
    value, control = (found[score] - found["blind"] for score in ("exact_match", "shuffled"))
    claim = (
        f"{connector}: exact match less the blind prior [{found['exact_match']:.1f} - {found['blind']:.1f}; "
        f"{num_tokens} tokens an image, a step {time_of_mlp:.2f} times the MLP's]"
    )
    return Row(claim=claim, value=value, bar=BAR, sense=">=", control=control)


if __name__ == "__main__":
    sys.exit(main())
