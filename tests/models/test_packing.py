"""Texts one behind the other: positions, places and attention are those of each text alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_train.models.packing import Texts, attend_texts

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(0, 3))
def test_every_token_has_its_place_and_padding_has_none(lengths: list[int], num_more: int) -> None:
    texts, longest = Texts.of(lengths, CPU), max(lengths) + num_more
    assert texts.starts_B1.tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    assert texts.positions_N.tolist() == [place for length in lengths for place in range(length)]
    is_token = torch.arange(longest) < torch.tensor(lengths)[:, None]
    assert texts.places(longest).tolist() == is_token.flatten().nonzero().squeeze(1).tolist()


def by_mask(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """The same through one table of what may be read."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (owner[:, None] == owner).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.sampled_from([(2, 2), (4, 2), (4, 1)]), st.sampled_from([None, 0.3]))
def test_values_and_gradients_are_those_of_a_block_diagonal_mask(
    lengths: list[int], heads: tuple[int, int], scale: float | None
) -> None:
    """fp64; measured 2e-16 of values and 9e-16 of gradients."""
    generator, num_tokens = torch.Generator().manual_seed(0), sum(lengths)
    q, k, v = (
        torch.randn(1, num, num_tokens, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for num in (heads[0], heads[1], heads[1])
    )
    weight = torch.randn(q.shape, dtype=torch.float64, generator=generator)
    found = attend_texts(q, k, v, Texts.of(lengths, CPU), scale=scale)
    expected = by_mask(q, k, v, lengths, scale)
    assert (found - expected).abs().max() < 1e-13
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected))
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine - right).abs().max() < 1e-13
    if len(lengths) > 1:  # the twin: a border forgotten
        joined = attend_texts(q, k, v, Texts.of([num_tokens], CPU), scale=scale)
        assert (joined - expected).abs().max() > 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for texts of any lengths is a GPU's")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_the_kernel_of_a_gpu_gives_the_same_numbers(heads: tuple[int, int]) -> None:
    lengths = [70, 1, 300, 17]
    q, k, v = (torch.randn(1, num, sum(lengths), 64, device="cuda") for num in (heads[0], heads[1], heads[1]))
    texts = Texts.of(lengths, q.device)
    found = attend_texts(q.bfloat16(), k.bfloat16(), v.bfloat16(), texts, scale=None)
    expected = attend_texts(q, k, v, texts, scale=None)
    assert (found.float() - expected).abs().max() < 0.03
