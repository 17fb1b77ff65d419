"""Blocks: reading one position, packed attention, activations, and values that survive a meta build."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlm_train.errors import ConfigError
from vlm_train.models.layers import Attention, AttentionPool, Block, make_activation, make_blocks, run_blocks, take


def blocks_of(num_layers: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return make_blocks(num_layers, width=16, num_heads=2, mlp_dim=40, activation="gelu", norm_eps=1e-5).double()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_reading_one_position_equals_computing_all(
    num_layers: int, num_tokens: int, causal: bool, padded: bool, seed: int
) -> None:
    blocks, generator = blocks_of(num_layers), torch.Generator().manual_seed(seed)
    x = torch.randn(3, num_tokens, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    read = torch.randint(0, num_tokens, (3,), generator=generator)
    mask = None
    if padded and not causal:  # every key up to the one that is read is real
        mask = (torch.arange(num_tokens) <= read[:, None])[:, None, None, :]
    one = run_blocks(blocks, x, mask=mask, causal=causal, read_B=read)
    every = take(run_blocks(blocks, x, mask=mask, causal=causal, read_B=None), read)
    assert torch.allclose(one, every, atol=1e-12)
    weight = torch.randn(one.shape, dtype=torch.float64, generator=generator)
    assert torch.allclose(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (one, every)), atol=1e-12)
    if num_tokens > 1:
        late = run_blocks(blocks, x, mask=mask, causal=causal, read_B=(read + 1) % num_tokens)
        assert not torch.allclose(late, every, atol=1e-6)


def test_attention_equals_torch_multihead_attention() -> None:
    ours = Attention(width=24, num_heads=3, depth=2).double()
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    with torch.no_grad():
        nn.init.normal_(ours.qkv.bias)
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, query = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 1, 24, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-12)
    assert torch.allclose(ours(x, query_BQD=query), theirs(query, x, x, need_weights=False)[0], atol=1e-12)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert torch.allclose(ours(x, causal=True), theirs(x, x, x, attn_mask=hidden)[0], atol=1e-12)
    assert not torch.allclose(ours(x, causal=True), ours(x), atol=1e-3)


def test_activations_are_what_they_are_called() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    exact = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    assert torch.allclose(make_activation("gelu")(x), exact, atol=1e-12)
    assert torch.allclose(make_activation("quick_gelu")(x), x * torch.sigmoid(1.702 * x), atol=1e-12)
    assert 1e-5 < (make_activation("gelu_tanh")(x) - exact).abs().max() < 1e-3
    with pytest.raises(ConfigError, match="unknown activation"):
        make_activation("gelu_new")  # type: ignore[arg-type]


def test_a_meta_build_filled_in_any_order_has_the_same_distribution() -> None:
    """reset_parameters fills a module's own tensors only, so parents may come after or before their children."""
    with torch.device("meta"):
        block = Block(width=64, num_heads=2, mlp_dim=256, activation="gelu", norm_eps=1e-5, depth=8)
        pool = AttentionPool(width=64, num_heads=2, mlp_dim=256, activation="gelu", norm_eps=1e-5)
    for order in (list, reversed):
        for root in (block, pool):
            root.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in root.parameters():
                    parameter.fill_(float("nan"))
            for module in order(list(root.modules())):  # type: ignore[operator]
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            assert all(parameter.isfinite().all() for parameter in root.parameters())
        assert block.attention.qkv.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert block.mlp.fc2.weight.std().item() == pytest.approx((2 * 8 * 64) ** -0.5, rel=0.05)
        assert pool.latent.std().item() == pytest.approx(64**-0.5, rel=0.4)
        assert block.mlp.fc1.bias.abs().max() == 0


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of its number of heads"):
        Attention(width=10, num_heads=3, depth=1)
