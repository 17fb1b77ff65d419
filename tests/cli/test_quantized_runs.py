"""Runs whose language model is kept in 4 bits beside adapters: what is handed over, SIGKILL among them, and export."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm_train import build, origins
from vlm_train.engine import checkpoints
from vlm_train.models.lora import merged
from vlm_train.models.nf4 import quantized
from vlm_train.schema import read_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

SMALL = (
    *_runs.TINY_ANSWERER, "trainer.global_batch=8", "checkpoint.every_steps=2", "+model.feature_layer=-2",
    "model.vision._target_=vlm_train.models.vision.vit.VisionTransformer", "+model.vision.pool=cls",
    "model.vision.num_layers=2",
)  # fmt: skip
LORA = "lora: {rank: 4, alpha: 8, dropout: 0.2, quantize: nf4}"
STAGES = (
    "+stages.align={trainer: {max_steps: 2}, data: {template: plain}, optim: adamw_connector}",
    "+stages.adapt={trainer: {max_steps: 6}, data: {template: chatml}, optim: adamw_frozen_vision, seed: 1, "
    f"model: {{text: {{{LORA}}}}}}}",
    "+stages.whole={trainer: {max_steps: 2}, data: {template: chatml}, optim: adamw_frozen_vision, seed: 2}",
)
ALIGN, ADAPT, WHOLE = "stage-01-align", "stage-02-adapt", "stage-03-whole"
PACKED = "text.network.model.layers.0.mlp.up_proj.base_layer."


def words(scenes: Path, run: Path, *extra: str) -> list[str]:
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    return ["train", *SMALL, *shards, *STAGES, f"run.dir={run}", *extra]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    assert _runs.call(folder, words(scenes, folder / "run")).count("trained: ") == 3
    return folder / "run"


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    newest = checkpoints.newest(run / stage / "checkpoints")
    assert newest is not None
    return origins.trained_weights(newest)["model"]


@pytest.mark.slow
def test_weights_are_quantised_at_the_start_of_a_stage_and_dequantised_at_that_of_the_next(whole: Path) -> None:
    align, adapt = weights(whole, ALIGN), weights(whole, ADAPT)
    moved = set()
    for name, tensor in adapt.items():
        if name.endswith("base_layer.weight"):
            assert tensor.dtype == torch.uint8
            packed, absmax = quantized(align[name.replace(".base_layer.", ".")])  # once, from what the stage began with
            assert torch.equal(packed, tensor)
            assert torch.equal(absmax, adapt[name.replace("weight", "absmax")])
        elif "absmax" not in name and (name not in align or not torch.equal(align[name], tensor)):
            moved.add(name)
    assert moved == {name for name in adapt if "lora_" in name or name.startswith("connector.")}
    assert sum(tensor.dtype == torch.uint8 for tensor in adapt.values()) == 2 * 7
    config = read_config(whole / WHOLE)
    parts = build.network(config, build.load_tokenizer(str(whole / WHOLE / "tokenizer")))
    origins.start(parts, {"model": adapt, "objective": {}}, whose="the stage before")
    state, expected = parts.model.state_dict(), merged(adapt)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    loaded = build.load(whole / ADAPT).model.state_dict()
    assert loaded.keys() == adapt.keys() and all(torch.equal(loaded[name], adapt[name]) for name in loaded)
    last, first = _runs.losses(whole / ADAPT)[-1], _runs.losses(whole / WHOLE)[0]
    assert abs(first - last) < 0.5 < _runs.losses(whole / ADAPT)[0] - last


@pytest.mark.slow
def test_killed_among_them_the_same_command_tells_the_same_story(tmp_path: Path, scenes: Path, whole: Path) -> None:
    run = tmp_path / "run"
    command = words(scenes, run)
    _runs.kill_after(tmp_path, command, run / ADAPT, 3)
    _runs.call(tmp_path, command)
    for stage in (ALIGN, ADAPT, WHOLE):
        assert _runs.learned(run / stage) == _runs.learned(whole / stage)
    assert all(torch.equal(x, weights(whole, ADAPT)[name]) for name, x in weights(run, ADAPT).items())
    assert _runs.learned(whole / ADAPT) != _runs.learned(whole / ALIGN)


@pytest.mark.slow
def test_two_ranks_that_share_packed_weights_learn_what_one_learns(tmp_path: Path, scenes: Path) -> None:
    """fp64, without dropout, which ranks draw by their place; measured 9e-16. The twin: weights that are not
    quantised."""
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    common = [*SMALL, *shards, "data.template=chatml", "precision=fp64", "trainer.max_steps=4"]
    packed = "++model.text.lora={rank: 4, alpha: 8, quantize: nf4}"
    machines = {"one": (packed,), "two": (packed, "trainer.devices=2", "strategy=fsdp2"),
                "other": (packed.replace(", quantize: nf4", ""),)}  # fmt: skip
    for name, machine in machines.items():
        _runs.call(tmp_path, ["train", *common, *machine, f"run.dir={tmp_path / name}"])
    one = _runs.losses(tmp_path / "one")
    assert _runs.losses(tmp_path / "two") == pytest.approx(one, abs=1e-12)
    assert _runs.losses(tmp_path / "other") != pytest.approx(one, abs=1e-3)
    states = [build.load(tmp_path / name).model.state_dict() for name in ("one", "two")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items() if "base_layer" in name)
    assert all(torch.allclose(tensor, states[1][name], atol=1e-6) for name, tensor in states[0].items())


@pytest.mark.slow
def test_an_export_is_dequantised_and_merged(tmp_path: Path, whole: Path) -> None:
    told = _runs.call(tmp_path, ["export", f"run={whole / ADAPT}", "out=folder"])
    assert "certificate" in told
    tensors, expected = load_file(tmp_path / "folder" / "model.safetensors"), merged(weights(whole, ADAPT))
    assert not any("lora" in name or "absmax" in name for name in tensors)
    found = {name.rpartition("layers.")[2]: x for name, x in tensors.items() if "language_model.layers." in name
             or "language_model.model.layers." in name}  # fmt: skip
    ours = {
        name.rpartition("layers.")[2]: x
        for name, x in expected.items()
        if name.startswith("text.network.model.layers.")
    }
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
