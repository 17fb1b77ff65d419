"""Real runs under FSDP2: what they learn, and checkpoints that any strategy on any number of ranks goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import _runs
import pytest
import torch

from vlm_train.engine import checkpoints, states

SHARDED = ("trainer.devices=2", "strategy=fsdp2")
DDP = ("trainer.devices=2", "strategy=ddp")
AVERAGED = ("optim.ema_decay=0.9", "optim.grad_clip=0.5")
NUM_STEPS = 10


def words(data: Path, run: Path, *extra: str) -> list[str]:
    common = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every_steps=4", f"run.dir={run}")
    return _runs.train_words(data, *common, *extra)


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of one process: in fp64, and in fp32 with averaging and clipping."""
    folder = tmp_path_factory.mktemp("alone")
    losses = {}
    for name, extra in {"fp64": ("precision=fp64",), "fp32": AVERAGED}.items():
        _runs.call(folder, words(scenes, folder / name, *extra))
        losses[name] = _runs.losses(folder / name)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("trainer.micro_batch=5", "strategy.recompute=true")], ids=["whole", "micro"])
def test_sharded_ranks_learn_what_one_process_learns(
    tmp_path: Path, scenes: Path, alone: dict[str, list[float]], extra: tuple[str, ...]
) -> None:
    _runs.call(tmp_path, words(scenes, tmp_path / "run", *SHARDED, "precision=fp64", *extra))
    losses = _runs.losses(tmp_path / "run")
    assert losses == pytest.approx(alone["fp64"], abs=1e-12)  # measured 1.3e-15
    assert losses != pytest.approx(alone["fp32"], abs=1e-12)  # the twin: another arithmetic is seen


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded run on two ranks that nobody interrupts."""
    run = tmp_path_factory.mktemp("sharded") / "whole"
    _runs.call(run.parent, words(scenes, run, *SHARDED))
    return run


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on_bit_by_bit_and_on_one_rank(
    tmp_path: Path, scenes: Path, whole: Path, alone: dict[str, list[float]]
) -> None:
    killed, other = tmp_path / "killed", tmp_path / "other"
    _runs.kill_after(tmp_path, words(scenes, killed, *SHARDED), killed, 5)
    shutil.copytree(killed, other, symlinks=True)
    _runs.call(tmp_path, words(scenes, killed, *SHARDED))
    assert _runs.learned(killed) == _runs.learned(whole)
    _runs.call(tmp_path, words(scenes, other, "trainer.devices=1", "strategy=fsdp2"))
    assert _runs.losses(other) == pytest.approx(_runs.losses(whole), abs=1e-5)  # measured 4.8e-7
    assert alone["fp32"] != pytest.approx(_runs.losses(whole), abs=1e-5)  # the twin: clipping is seen


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(DDP, SHARDED), (SHARDED, DDP)], ids=["ddp-fsdp2", "fsdp2-ddp"])
def test_one_strategy_goes_on_from_the_checkpoint_of_another(
    tmp_path: Path,
    scenes: Path,
    alone: dict[str, list[float]],
    before: tuple[str, ...],
    after: tuple[str, ...],
) -> None:
    """With a moving average and clipping, so that weights, averages, and both moments of AdamW must arrive."""
    run = tmp_path / "run"
    _runs.kill_after(tmp_path, words(scenes, run, *before, *AVERAGED), run, 5)
    _runs.call(tmp_path, words(scenes, run, *after, *AVERAGED))
    assert _runs.losses(run) == pytest.approx(alone["fp32"], abs=1e-5)  # measured 1.3e-6


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_whole(tmp_path: Path, whole: Path) -> None:
    path = checkpoints.newest(whole / "checkpoints")
    assert path is not None
    files = {file.name for file in (path / checkpoints.STATE).iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp"} <= files  # both ranks wrote their part
    weights = states.read_weights(path)
    state = states.read_sharded(path / checkpoints.STATE)
    assert weights.keys() == state["state_dict"].keys()
    assert all(torch.equal(weights[name], state["state_dict"][name]) for name in weights)
    moments = state["optimizer_states"][0]["state"]
    assert moments.keys() <= weights.keys() and len(moments) > 10
    assert all(slots["exp_avg"].shape == weights[name].shape for name, slots in moments.items())
    printed = _runs.call(tmp_path, ["evaluate", f"run={whole}"])
    result = json.loads((whole / "evals" / "retrieval.json").read_text())
    assert f"{result['text_to_image']['R@5']:.2f}" in printed
    exported = _runs.call(tmp_path, ["export", f"run={whole}", f"out={tmp_path / 'exported'}"])
    assert "difference" in exported


@pytest.mark.slow
def test_a_foreign_tower_is_shared_by_ranks_and_counts_its_arithmetic_alone(tmp_path: Path, scenes: Path) -> None:
    """It counts by running, on rank 0: were its weights shared there, that would wait for the other rank."""
    small = ("model.vision.width=32", "model.vision.num_layers=1", "model.vision.num_heads=2", "trainer.global_batch=6")
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}", "data=scenes")
    steps = ("trainer.max_steps=2", "schedule.warmup_steps=1", "evaluation=none", "data.num_workers=0")
    common = ["train", "experiment=lit_minilm", *small, *shards, *steps, "trainer.num_threads=1"]
    for name, machine in {"alone": (), "shared": SHARDED}.items():
        _runs.call(tmp_path, [*common, *machine, f"run.dir={tmp_path / name}"], timeout=120)
    losses = [_runs.losses(tmp_path / name) for name in ("alone", "shared")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert all(row["mfu"] > 0 for row in _runs.rows(tmp_path / "shared"))
