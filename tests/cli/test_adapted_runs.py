"""Runs in stages without, with and again without adapters: what is handed over, and SIGKILL among adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vlm_train import build, origins
from vlm_train.engine import checkpoints
from vlm_train.models.lora import merged
from vlm_train.schema import read_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

SMALL = (
    *_runs.TINY_ANSWERER, "trainer.max_steps=6", "trainer.global_batch=8", "checkpoint.every_steps=2",
)  # fmt: skip
STAGES = (
    "+stages.align={data: {template: plain}, optim: adamw_connector}",
    "+stages.adapt={data: {template: chatml}, optim: adamw_frozen_vision, seed: 1, "
    "model: {text: {lora: {rank: 4, alpha: 8, dropout: 0.2}}}}",
    "+stages.whole={data: {template: chatml}, optim: adamw_frozen_vision, seed: 2, trainer: {max_steps: 2}}",
)
ALIGN, ADAPT, WHOLE = "stage-01-align", "stage-02-adapt", "stage-03-whole"


def words(scenes: Path, run: Path, *extra: str) -> list[str]:
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    without = [word for word in SMALL if word != "trainer.max_steps=6"]  # which one stage says otherwise
    stages = [word.replace("data: {", "trainer: {max_steps: 6}, data: {") if "whole" not in word else word
              for word in STAGES]  # fmt: skip
    return ["train", *without, *shards, *stages, f"run.dir={run}", *extra]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    assert _runs.call(folder, words(scenes, folder / "run")).count("trained: ") == 3
    return folder / "run"


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    newest = checkpoints.newest(run / stage / "checkpoints")
    assert newest is not None
    return origins.trained_weights(newest)["model"]


@pytest.mark.slow
def test_adapters_come_and_go_between_stages(whole: Path) -> None:
    align, adapt = weights(whole, ALIGN), weights(whole, ADAPT)
    assert "text.lora_scale" in adapt and float(adapt["text.lora_scale"]) == 2.0
    moved = set()
    for name, tensor in adapt.items():
        before = align.get(name.replace(".base_layer.", "."))
        if before is None or not torch.equal(before, tensor):
            moved.add(name)
    assert moved == {name for name in adapt if "lora_" in name or name.startswith("connector.")}
    config = read_config(whole / WHOLE)
    parts = build.network(config, build.load_tokenizer(str(whole / WHOLE / "tokenizer")))
    origins.start(parts, {"model": adapt, "objective": {}}, whose="the stage before")
    state, expected = parts.model.state_dict(), merged(adapt)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    name = "text.network.model.layers.0.mlp.up_proj.weight"  # the twin: base weights alone
    assert (state[name] - adapt[name.replace(".weight", ".base_layer.weight")]).abs().max() > 1e-3
    loaded = build.load(whole / ADAPT).model.state_dict()
    assert loaded.keys() == adapt.keys() and all(torch.equal(loaded[name], adapt[name]) for name in loaded)
    last, first = _runs.losses(whole / ADAPT)[-1], _runs.losses(whole / WHOLE)[0]
    assert abs(first - last) < 0.5 < _runs.losses(whole / ADAPT)[0] - last


@pytest.mark.slow
def test_killed_among_adapters_the_same_command_tells_the_same_story(tmp_path: Path, scenes: Path, whole: Path) -> None:
    run = tmp_path / "run"
    command = words(scenes, run)
    _runs.kill_after(tmp_path, command, run / ADAPT, 3)
    _runs.call(tmp_path, command)
    for stage in (ALIGN, ADAPT, WHOLE):
        assert _runs.learned(run / stage) == _runs.learned(whole / stage)
    assert all(torch.equal(x, weights(whole, ADAPT)[name]) for name, x in weights(run, ADAPT).items())
    assert _runs.learned(whole / ADAPT) != _runs.learned(whole / ALIGN)


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_learn_what_one_learns(tmp_path: Path, scenes: Path) -> None:
    """fp64, without dropout, which ranks draw by their place; measured 2e-15."""
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    common = [*SMALL, *shards, "data.template=chatml", "precision=fp64", "++model.text.lora={rank: 4, alpha: 8}"]
    machines = {"one": ("trainer.micro_batch=3",), "two": ("trainer.devices=2", "strategy=fsdp2"),
                "other": ("optim.weight_decay=0.1",)}  # fmt: skip
    for name, machine in machines.items():
        _runs.call(tmp_path, ["train", *common, *machine, f"run.dir={tmp_path / name}"])
    one = _runs.losses(tmp_path / "one")
    assert _runs.losses(tmp_path / "two") == pytest.approx(one, abs=1e-12)
    assert _runs.losses(tmp_path / "other") != pytest.approx(one, abs=1e-12)  # the twin
