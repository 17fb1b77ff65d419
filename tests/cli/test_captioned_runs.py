"""CoCa through the command line: the caption's loss falls, and no machine changes it; retrieval reads the model."""

from __future__ import annotations

import json
from pathlib import Path

import _runs
import pytest
import torch

from vlm_train.data import building
from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.schema import plain, read_config

COCA = (
    "train", "model=coca_tiny", "objective=coca", "data=scenes", "model.embed_dim=16", "model.vision.width=32",
    "model.vision.num_queries=4", "model.vision.num_heads=2", "model.vision.tower.image.size=32",
    "model.vision.tower.width=32", "model.vision.tower.num_layers=1", "model.vision.tower.num_heads=2",
    "model.text.width=32", "model.text.num_layers=1", "model.text.num_heads=2", "model.decoder.width=32",
    "model.decoder.num_layers=1", "model.decoder.num_heads=2", "model.tokenizer.vocab_size=300",
    "schedule.warmup_steps=3", "trainer.global_batch=24", "trainer.num_threads=1", "data.num_workers=0",
    "trainer.max_steps=30", "optim.lr=5e-3",
)  # fmt: skip


TWO = ("trainer.devices=2", "strategy=ddp", "trainer.micro_batch=4", "strategy.recompute=true")


def run(folder: Path, scenes: Path, name: str, *extra: str) -> Path:
    """The folder of a run that has ended."""
    data = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    _runs.call(folder, [*COCA, *data, f"run.dir={folder / name}", *extra])
    return folder / name


def entropy_of_tokens(path: Path) -> float:
    """What a caption's token costs, in nats, who knows how often each is a label and nothing else."""
    tokenizer = load_tokenizer(str(path / "tokenizer"))
    ids, mask = tokenizer(list(building.train_captions(plain(read_config(path).data))))
    _, counts = ids[:, 1:][mask[:, 1:]].unique(return_counts=True)
    return float(torch.distributions.Categorical(counts.double()).entropy())


def test_a_caption_becomes_likelier_and_retrieval_reads_the_model(tmp_path: Path, scenes: Path) -> None:
    path = run(tmp_path, scenes, "run")
    rows, entropy = _runs.rows(path), entropy_of_tokens(path)
    for row in rows:
        assert row["loss"] == pytest.approx(row["contrast/loss"] + 2 * row["caption/loss"], rel=1e-5)
    assert rows[0]["caption/loss"] > entropy > rows[-1]["caption/loss"] + 0.5  # measured 6.29, 3.72, 2.64
    assert rows[-1]["caption/accuracy"] > 0.3 > 0.1 > rows[0]["caption/accuracy"]
    before = json.loads((path / "evals" / "retrieval.json").read_text())
    _runs.call(tmp_path, ["evaluate", f"run={path}"])
    after = json.loads((path / "evals" / "retrieval.json").read_text())
    assert before["text_to_image"] == after["text_to_image"] and after["num_pairs"] > 0


@pytest.mark.slow
def test_the_machine_does_not_change_what_is_learned(tmp_path: Path, scenes: Path) -> None:
    short = ("trainer.max_steps=4", "precision=fp64", "evaluation=none", "checkpoint.every_steps=1000")
    one, two = (_runs.rows(run(tmp_path, scenes, name, *short, *words)) for name, words in (("one", ()), ("two", TWO)))
    for name in ("loss", "grad_norm", "contrast/loss", "caption/loss", "caption/accuracy"):
        # sums of fp64 in another order; measured 2.1e-16
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-12)
    alone = _runs.rows(run(tmp_path, scenes, "alone", *short, *TWO, "objective=captioning"))  # half of the model idle
    assert alone[0]["loss"] == pytest.approx(one[0]["caption/loss"], rel=1e-12)
    assert abs(alone[-1]["loss"] - one[-1]["caption/loss"]) > 1e-3  # the twin: another objective learns otherwise
