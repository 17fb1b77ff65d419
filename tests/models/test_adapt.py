"""Weights in a network of another size: positions are resized, everything else that differs is named."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.errors import ConfigError
from vlm_train.models.adapt import adapted, load_weights, resized_grid, resized_sequence
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.resnet import ResNet
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import TextSpec


def make_model(
    *, size: int = 32, pool: str = "cls", context: int = 8, seed: int = 0, num_layers: int = 1
) -> DualEncoder:
    torch.manual_seed(seed)
    spec = TextSpec(vocab_size=50, context_length=context, pad_id=47, bos_id=48, eos_id=49)
    vision = VisionTransformer(
        image={"size": size}, patch_size=8, width=32, num_layers=num_layers, num_heads=2, pool=pool
    )
    return DualEncoder(
        vision=vision, text=TextTransformer(spec=spec, width=16, num_layers=1, num_heads=2), embed_dim=12
    )


def plane(side: int) -> Tensor:
    """Positions that are linear in row and column, [side * side, 2]: any resize must keep them so."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.stack(torch.meshgrid(centres, 2 * centres, indexing="ij"), dim=-1).flatten(0, 1)


@pytest.mark.parametrize(("side", "new_side"), [(7, 14), (14, 7), (6, 16)])
@pytest.mark.parametrize("num_front", [0, 1])
def test_a_grid_keeps_its_rows_and_columns(side: int, new_side: int, num_front: int) -> None:
    front = torch.full((num_front, 2), 9.0, dtype=torch.float64)
    wanted = torch.cat([front, plane(new_side)])
    got = resized_grid(torch.cat([front, plane(side)]), wanted, num_front=num_front)
    assert got.shape == wanted.shape and torch.equal(got[:num_front], front)
    inner = torch.zeros(new_side, new_side, dtype=torch.bool)
    edge = math.ceil(2 * max(1, new_side / side))  # a kernel that reaches beyond the edge sees the edge repeated
    inner[edge:-edge, edge:-edge] = True
    inner = torch.cat([torch.ones(num_front, dtype=torch.bool), inner.flatten()])
    assert (got - wanted)[inner].abs().max() < 0.01
    transposed = torch.cat([front, plane(side).unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)])
    twin = resized_grid(transposed, wanted, num_front=num_front)  # rows taken for columns
    assert (twin - wanted)[inner].abs().max() > 0.05


def test_bicubic_is_that_of_torch() -> None:
    old = torch.randn(1 + 16, 5)
    got = resized_grid(old, torch.empty(1 + 49, 5), num_front=1)
    image = old[1:].T.reshape(1, 5, 4, 4)
    expected = F.interpolate(image, size=(7, 7), mode="bicubic", antialias=True)[0].reshape(5, 49).T
    assert torch.equal(got[0], old[0]) and torch.allclose(got[1:], expected)
    assert resized_grid(old, torch.empty(17, 5), num_front=1) is old


def test_texts_are_cut_or_stretched() -> None:
    old = torch.arange(8.0)[:, None].expand(8, 3)
    assert torch.equal(resized_sequence(old, torch.empty(5, 3)), old[:5])
    longer = resized_sequence(old, torch.empty(15, 3))
    assert torch.allclose(longer, (torch.arange(15.0) / 2)[:, None].expand(15, 3))


def test_a_model_of_another_size_starts_with_the_same_weights() -> None:
    small, large = make_model(), make_model(size=48, context=12, seed=1)
    load_weights(large, small.state_dict(), whose="small")
    before, after = small.state_dict(), large.state_dict()
    for name, value in before.items():
        if not name.endswith(".position"):
            assert torch.equal(after[name], value)
    assert after["vision.position"].shape == (37, 32) and torch.equal(
        after["vision.position"][0], before["vision.position"][0]
    )
    again = make_model(seed=2)
    load_weights(again, small.state_dict(), whose="small")
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_attention_pooling_of_a_resnet_takes_other_image_sizes() -> None:
    small, large = (ResNet(image={"size": s}, layers=[1] * 4, width=8, pool="attention") for s in (64, 96))
    load_weights(large, small.state_dict(), whose="small")
    assert torch.equal(large.attention_pool.position[0], small.attention_pool.position[0])
    assert large(torch.randn(1, 3, 96, 96)).shape == (1, 256)


def test_what_differs_otherwise_is_named_and_nothing_is_loaded() -> None:
    small = make_model()
    for other, told in (
        (make_model(num_layers=2), "missing: vision.blocks.1.attention.out.bias"),
        (make_model(pool="mean"), "unexpected: vision.class_token"),
    ):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ConfigError, match="weights of run A do not fit") as caught:
            load_weights(other, small.state_dict(), whose="run A")
        assert told in str(caught.value) and caught.value.remedy
        assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    state = {**small.state_dict(), "text_projection.weight": torch.zeros(13, 16)}
    with pytest.raises(ConfigError) as caught:
        load_weights(make_model(), state, whose="run A")
    assert "another shape: text_projection.weight (13, 16) for (12, 16)" in str(caught.value)


def test_without_memory_the_same_is_told() -> None:
    with torch.device("meta"):
        small, large, other = make_model(), make_model(size=48, context=12), make_model(num_layers=2)
    load_weights(large, small.state_dict(), whose="small")
    assert adapted(large, small.state_dict())["vision.position"].shape == (37, 32)
    with pytest.raises(ConfigError, match="do not fit"):
        load_weights(other, small.state_dict(), whose="small")
