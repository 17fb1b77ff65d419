"""The convolutional tower: CLIP's form exactly, and independence from the batch under group norm."""

from __future__ import annotations

import re

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet

from vlm_train.errors import ConfigError
from vlm_train.models.vision.resnet import ResNet


def to_open_clip(name: str, layers: list[int]) -> str:
    """Our name of a ResNet tensor as open_clip's."""
    name = re.sub(r"^stem\.(\d)\.0\.", lambda m: f"conv{int(m[1]) + 1}.", name)
    name = re.sub(r"^stem\.(\d)\.1\.", lambda m: f"bn{int(m[1]) + 1}.", name)
    if match := re.match(r"blocks\.(\d+)\.(body|shortcut)\.(\d)\.(\d)\.(.*)", name):
        index, part, step, kind, leaf = int(match[1]), match[2], int(match[3]), match[4], match[5]
        stage = next(s for s in range(4) if index < sum(layers[: s + 1]))
        index -= sum(layers[:stage])
        step = min(step, 2)  # a pool may stand before the third convolution
        inner = f"downsample.{kind}" if part == "shortcut" else f"{('conv', 'bn')[int(kind)]}{step + 1}"
        return f"layer{stage + 1}.{index}.{inner}.{leaf}"
    return name


def test_features_equal_those_of_open_clip() -> None:
    torch.manual_seed(0)
    layers = [2, 1, 1, 1]
    ours = ResNet(image={"size": 64}, layers=layers, width=8, norm="batch", pool="attention").eval()
    theirs = ModifiedResNet(layers, output_dim=256, heads=4, image_size=64, width=8).eval()
    state = {}
    for name, tensor in ours.state_dict().items():
        if name.startswith("attention_pool.attention.qkv."):
            leaf = name.rsplit(".", 1)[1]
            state |= {f"attnpool.{part}_proj.{leaf}": piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}
            continue
        name = name.replace("attention_pool.attention.out", "attnpool.c_proj")
        name = name.replace("attention_pool.position", "attnpool.positional_embedding")
        state[to_open_clip(name, layers)] = tensor
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    difference = (ours(images) - theirs(images)).abs().max() / theirs(images).abs().max()
    assert difference < 1e-5  # measured 5e-7


def test_group_norm_does_not_see_the_batch_and_batch_norm_does() -> None:
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(0)
    group = ResNet(image={"size": 64}, layers=[1, 1, 1, 1], width=8).double().train()
    assert torch.allclose(group(images)[:2], group(images[:2]), atol=1e-12)
    batch = ResNet(image={"size": 64}, layers=[1, 1, 1, 1], width=8, norm="batch").double().train()
    assert not torch.allclose(batch(images)[:2], batch(images[:2]), atol=1e-3)


def test_choices_are_checked_and_flops_are_counted() -> None:
    with pytest.raises(ConfigError, match="cannot be built") as caught:
        ResNet(image={"size": 50}, layers=[1, 1], norm="layer")  # type: ignore[arg-type]
    assert caught.value.got == "layers=[1, 1], norm=layer, image.size=50"
    tower = ResNet(image={"size": 224}, layers=[3, 4, 6, 3], pool="attention")
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    gmacs = tower.forward_flops() / 2e9
    assert gmacs == pytest.approx(6.0, rel=0.1)  # CLIP's RN50 image tower
    assert tower.training and all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())
