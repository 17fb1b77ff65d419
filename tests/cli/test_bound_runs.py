"""ImageBind from the command line: stages, new towers beside frozen ones, and one result on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import _runs
import imagebind
import pytest
import torch

from vlm_train import origins
from vlm_train.engine import checkpoints

SHORT = ("trainer.max_steps=4", "trainer.global_batch=24", "trainer.num_threads=1", "schedule.warmup_steps=2",
         "checkpoint.every_steps=4", "model.tokenizer.vocab_size=300")  # fmt: skip
BOUND = ("model=bound_tiny", "objective=imagebind", "optim=adamw_frozen_anchor", "evaluation=imagebind")
MACHINES = {
    "one": (),
    "two": ("trainer.devices=2", "strategy=ddp", "trainer.micro_batch=5"),
    "sharded": ("trainer.devices=2", "strategy=fsdp2"),
}


def thinned(samples: list[dict[str, bytes]]) -> None:
    """The first half has no sound, so that a step or one of its ranks has none at all; every third has no motion."""
    for number, sample in enumerate(samples):
        if number < len(samples) // 2:
            del sample["wav"]
        if number % 3 == 0:
            del sample["motion.npy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bound")
    full = _runs.make_scenes(folder, 80, "--modalities", "depth,audio,motion")
    return imagebind.rewritten(full, folder / "thinned", thinned)


@pytest.fixture(scope="module")
def staged(data: Path) -> Path:
    """A finished run of the recipe."""
    run = data.parent / "staged"
    output = _runs.call(data.parent, ["train", "experiment=imagebind_scenes", *words(data, run)])
    assert output.count("trained: ") == 2 and "text to audio" in output and "text to motion" in output
    return run


def words(data: Path, run: Path, *extra: str) -> list[str]:
    return [*SHORT, f"data.train.shards={data / 'train'}", f"data.val.shards={data / 'val'}", f"run.dir={run}", *extra]


@pytest.mark.slow
def test_new_towers_are_told_and_only_they_learn(staged: Path, data: Path) -> None:
    first, second = staged / "stage-01-image_text", staged / "stage-02-bound"
    started = [json.loads(line) for line in (second / "events.jsonl").read_text().splitlines()]
    told = [event["new_towers"] for event in started if event["event"] == "start"]
    assert told == [["depth", "audio", "motion"]] and "new_towers" not in (first / "events.jsonl").read_text()
    before, after = (origins.trained_weights(checkpoints.newest(run / "checkpoints")) for run in (first, second))
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert {name.split(".")[1] for name in after["model"].keys() - before["model"].keys()} == {
        "depth",
        "audio",
        "motion",
    }
    assert "parts.audio.logit_scale" in after["objective"]
    assert after["objective"]["parts.audio.logit_scale"].item() == pytest.approx(2.9957323)  # ln 20, and it stays


@pytest.mark.slow
def test_the_machine_does_not_change_what_is_bound(staged: Path, data: Path) -> None:
    """Also where no rank, or one alone, has a sound; the text tower, which no pair needs, is not waited for."""
    losses = {}
    for name, machine in MACHINES.items():
        run = data.parent / name
        extra = ("precision=fp64", "evaluation=none", "data=scenes", f"init={staged / 'stage-01-image_text'}",
                 "data.shuffle_window=0", *machine)  # fmt: skip
        _runs.call(data.parent, ["train", *BOUND[:3], *extra, *words(data, run)])
        losses[name] = _runs.losses(run)
        assert {row["audio/loss"] > 0 for row in _runs.rows(run)} == {False, True}
    for name in ("two", "sharded"):
        assert losses[name] == pytest.approx(losses["one"], abs=1e-12)  # the rounding of fp64
    assert losses["one"][0] != pytest.approx(losses["one"][-1], abs=1e-3)
