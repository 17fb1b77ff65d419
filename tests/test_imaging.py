"""Colours are torchvision's, and what happens to a picture depends on that picture alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2

from vlm_train.imaging import recolour

FACTORS = [(0.7, 1.0, 1.0), (1.0, 1.4, 1.0), (1.0, 1.0, 0.6), (1.3, 0.8, 1.2), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0)]


def noise(num: int, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    array = np.random.default_rng(seed).integers(0, 256, (num, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(array)


def torchvision_says(image: Tensor, factors: tuple[float, float, float]) -> Tensor:
    """In grey levels, not rounded."""
    values = v2.functional.adjust_brightness(image.double() / 255, factors[0])
    values = v2.functional.adjust_contrast(values, factors[1])
    return v2.functional.adjust_saturation(values, factors[2]) * 255


@pytest.mark.parametrize("factors", FACTORS)
def test_colours_are_torchvisions(factors: tuple[float, float, float]) -> None:
    image = noise(1)
    ours = recolour(image, torch.tensor([factors])).double()
    # measured 0.505 at most: half a level is the rounding to uint8, the rest is luma of three digits against four
    assert (ours - torchvision_says(image, factors)).abs().max() < 0.6
    wrong = (factors[0], factors[1] * 0.98, factors[2] + 0.02) if factors[0] else (0.01, 1.0, 1.0)
    assert (ours - torchvision_says(image, wrong)).abs().max() > 0.6


@settings(max_examples=60, deadline=None)
@given(factors=st.tuples(*[st.floats(0, 2)] * 3), seed=st.integers(0, 9), side=st.integers(1, 40))
def test_any_factors_are_torchvisions(factors: tuple[float, float, float], seed: int, side: int) -> None:
    image = noise(1, side, side + 3, seed)
    ours = recolour(image, torch.tensor([factors])).double()
    assert (ours - torchvision_says(image, factors)).abs().max() < 0.6


def test_factors_of_one_change_nothing_and_black_stays_black() -> None:
    image = noise(4)
    assert torch.equal(recolour(image, torch.ones(4, 3)), image)
    assert not recolour(torch.zeros_like(image), torch.full((4, 3), 1.5)).any()


def test_a_saturation_of_zero_is_grey() -> None:
    grey = recolour(noise(2), torch.tensor([[1.2, 0.8, 0.0]] * 2))
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2]) and grey.float().std() > 1


def test_the_rest_of_the_batch_its_layout_and_the_threads_change_no_bit() -> None:
    images, factors = noise(9, 33, 31), 0.6 + 0.8 * torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    whole = recolour(images, factors)
    assert not torch.equal(whole, recolour(images, factors.flip(0)))  # the factors do matter
    assert all(torch.equal(whole[i : i + 1], recolour(images[i : i + 1], factors[i : i + 1])) for i in range(9))
    assert torch.equal(whole, recolour(images.contiguous(memory_format=torch.channels_last), factors))
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            assert torch.equal(whole, recolour(images, factors))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the processor")
def test_a_gpu_agrees_within_a_rounding() -> None:
    images, factors = noise(16, 64, 64), 0.6 + 0.8 * torch.rand(16, 3, generator=torch.Generator().manual_seed(0))
    there = recolour(images.cuda(), factors.cuda()).cpu().int()
    difference = (there - recolour(images, factors).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
