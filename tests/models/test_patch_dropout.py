"""Patches left out in training: uniform, a function of the sample's draw alone, and the same for any W x K."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.micro_batches import Budgets, take_rows
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.errors import ConfigError
from vlm_train.models import dual_encoder
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.patches import kept_patches, num_kept
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.resnet import ResNet
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.types import Batch, TextSpec, rank_share

SPEC = TextSpec(vocab_size=50, context_length=8, pad_id=47, bos_id=48, eos_id=49)
G, P = 11, 16
MICRO_BATCHES = {1: {1: 11, 2: 6, 3: 4}, 2: {1: 6, 2: 3, 3: 2}}  # world size -> K -> micro-batch


def make_model(pool: str = "cls", *, patch_dropout: float = 0.5) -> DualEncoder:
    torch.manual_seed(0)
    vision = VisionTransformer(image={"size": 32}, patch_size=8, width=32, num_layers=2, num_heads=2, pool=pool)
    text = TextTransformer(spec=SPEC, width=16, num_layers=1, num_heads=2)
    return DualEncoder(vision=vision, text=text, embed_dim=12, patch_dropout=patch_dropout).double()


def global_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 47, (G, 8), generator=generator)
    ids[:, 0], ids[:, -1] = 48, 49
    return Batch(
        images=torch.randint(0, 256, (G, 3, 32, 32), dtype=torch.uint8, generator=generator),
        text_ids=ids,
        text_mask=torch.ones(G, 8, dtype=torch.bool),
        weights=torch.ones(G),
        draws=torch.randint(0, 2**53, (G,), generator=generator),
    )


def split_mix(state: int) -> int:
    """The generator by its paper, in Python's unbounded integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@settings(max_examples=50, deadline=None)
@given(draw=st.integers(0, 2**53), num=st.integers(1, 40), share=st.floats(0, 0.99))
def test_the_patches_that_stay_are_those_of_the_lowest_hash(draw: int, num: int, share: float) -> None:
    hashes = [split_mix((draw + (patch + 1) * 0x9E3779B97F4A7C15) % 2**64) for patch in range(num)]
    signed = [value - 2**64 if value >= 2**63 else value for value in hashes]
    lowest = sorted(sorted(range(num), key=signed.__getitem__)[: num_kept(num, share)])
    assert kept_patches(torch.tensor([draw]), num_patches=num, num_kept=len(lowest)).tolist() == [lowest]


def test_every_patch_and_every_pair_of_patches_stays_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 2**53, (20_000,), generator=generator)
    kept = torch.zeros(len(draws), P).scatter_(1, kept_patches(draws, num_patches=P, num_kept=8), 1.0)
    together = kept.T @ kept / len(draws)
    assert (together.diagonal() - 0.5).abs().max() < 0.014  # 4 standard deviations of 20,000 draws
    pairs = together[~torch.eye(P, dtype=torch.bool)]
    assert (pairs - 0.5 * 7 / 15).abs().max() < 0.014


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_what_is_left_out_does_not_count_and_evaluation_reads_all(pool: str) -> None:
    model, batch = make_model(pool), global_batch()
    pixels = model.normalize(batch["images"]).requires_grad_()
    batch["images"] = pixels
    features = model(batch)["image_features"]
    (gradient,) = torch.autograd.grad((features * torch.randn_like(features)).sum(), pixels)
    is_read = (gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(1, 4, 5)) > 0).flatten(1)
    kept = kept_patches(batch["draws"], num_patches=P, num_kept=8)
    assert [row.nonzero().flatten().tolist() for row in is_read] == kept.tolist()
    assert torch.equal(model.eval()(batch)["image_features"], model.encode_image(pixels))
    assert not torch.allclose(model(batch)["image_features"], features, atol=1e-3)
    everything = torch.arange(P).expand(G, P)
    assert torch.allclose(model.encode_image(pixels, everything), model.encode_image(pixels), atol=1e-12)


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_the_arithmetic_falls_and_is_told_as_it_is(pool: str) -> None:
    model, batch = make_model(pool), global_batch()
    kept = kept_patches(batch["draws"], num_patches=P, num_kept=8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(batch["images"], kept)
    assert G * model.forward_flops(8)["vision"] == counter.get_total_flops()
    whole = make_model(pool, patch_dropout=0.0).forward_flops(8)["vision"]
    assert model.forward_flops(8)["vision"] < 0.67 * whole == 0.67 * model.eval().forward_flops(8)["vision"]


def gradients(world_size: int, micro_batch: int) -> dict[str, Tensor]:
    """Gradients of one step of the engine on this rank's share, averaged over ranks as data-parallel training does."""
    model, objective = make_model(), InfoNCE().double()
    rank = collectives.rank()
    plan = StepPlan(global_batch=G, budgets=Budgets(samples=micro_batch), rank=rank, world_size=world_size, seed=0)
    batch = take_rows(global_batch(), range(*rank_share(G, rank, world_size)))
    GradientStep(model=model, objective=objective, plan=plan).run(batch, 5, lambda scalar, is_last: scalar.backward())
    named = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    return {name: collectives.all_reduce_sum(p.grad) / world_size for name, p in named.items() if p.grad is not None}


def from_a_generator(draws_B: Tensor, *, num_patches: int, num_kept: int) -> Tensor:
    """The twin, as public trainers do it: replayed exactly, but another choice wherever the batch is cut otherwise."""
    return torch.rand(len(draws_B), num_patches).argsort(dim=1)[:, :num_kept]


def of_every_cut(world_size: int) -> dict[str, Any]:
    right = {str(k): gradients(world_size, size) for k, size in MICRO_BATCHES[world_size].items()}
    with mock.patch.object(dual_encoder, "kept_patches", from_a_generator):
        wrong = {str(k): gradients(world_size, size) for k, size in MICRO_BATCHES[world_size].items()}
    return {"right": right, "wrong": wrong}


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[name] - value).norm() / value.norm()) for name, value in expected.items())


def test_gradients_do_not_depend_on_ranks_and_micro_batches() -> None:
    one, two = of_every_cut(1), run_ranks(of_every_cut, 2, 2)[0]
    expected, twin = one["right"]["1"], one["wrong"]["1"]
    assert len(expected) > 20 and all(value.norm() > 0 for value in expected.values())
    for cuts in (one, two):
        for k in ("1", "2", "3"):
            assert largest_error(cuts["right"][k], expected) < 1e-12
            assert (cuts is one and k == "1") or largest_error(cuts["wrong"][k], twin) > 1e-2


def test_a_share_that_cannot_be_left_out_is_refused() -> None:
    tower = ResNet(image={"size": 32}, layers=[1, 1, 1, 1], width=8)
    text = TextTransformer(spec=SPEC, width=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="cannot leave out") as caught:
        DualEncoder(vision=tower, text=text, embed_dim=12, patch_dropout=0.5)
    assert "ResNet" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot leave out"):
        make_model(patch_dropout=1.0)
    assert num_kept(16, 0.99) == 1
