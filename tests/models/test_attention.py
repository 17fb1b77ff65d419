"""Attention kernels: the same numbers, refusals where one cannot run, and blocks that compile whole."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm_train.errors import ConfigError
from vlm_train.models import attention
from vlm_train.models.attention import KERNELS, Attend, choose_attention, eager, kernels_of, sdpa, told
from vlm_train.models.layers import Attention, Block

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}  # measured 7.7e-6 and 1.2e-14 at most over 2,000 cases


def outcome(attend: Attend, packed: Tensor, num_read: int | None, mask: Tensor | None, causal: bool) -> list[Tensor]:
    """Result and gradient of views into a packed projection [B, T, 3, H, C], as `Attention` makes them."""
    leaf = packed.clone().requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in leaf.unbind(2))
    out = attend(q[:, :, :num_read], k, v, mask=mask, causal=causal)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    assert leaf.grad is not None
    return [out.detach(), leaf.grad]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 9)),
    kind=st.sampled_from(["plain", "causal", "padding", "table", "one query"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_every_kernel_gives_the_same_numbers(
    sizes: tuple[int, int, int, int], kind: str, dtype: torch.dtype, seed: int
) -> None:
    num_rows, num_tokens, num_heads, head_dim = sizes
    generator = torch.Generator().manual_seed(seed)
    packed = 2 * torch.randn(num_rows, num_tokens, 3, num_heads, head_dim, generator=generator, dtype=dtype)
    length = torch.randint(1, num_tokens + 1, (num_rows, 1), generator=generator)
    mask = {
        "padding": (torch.arange(num_tokens) < length)[:, None, None, :],
        "table": (torch.rand(num_tokens, num_tokens, generator=generator) < 0.5) | torch.eye(num_tokens).bool(),
        "one query": (torch.arange(num_tokens) < length)[:, None, None, :],
    }.get(kind)
    given = (packed, 1 if kind == "one query" else None, mask, kind == "causal")
    expected = outcome(sdpa, *given)
    for name in ("eager", "flash"):
        assert difference(outcome(KERNELS[name], *given), expected) < TOLERANCE[dtype]  # type: ignore[index]
    if kind == "causal" and num_tokens > 1:  # the twin: the future is seen
        assert difference(outcome(eager, packed, None, None, False), expected) > 1e-3


def a_block() -> Block:
    torch.manual_seed(0)
    return Block(width=16, num_heads=2, mlp_dim=32, activation="gelu", norm_eps=1e-5, depth=2)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text, self.image_projection = a_block(), nn.Linear(3, 3), nn.Linear(2, 2)


def test_a_kernel_is_chosen_for_every_attention_of_ours_and_named() -> None:
    model = Towers()
    assert kernels_of(model) == {"vision": "sdpa"}
    choose_attention(model, "flash", CPU)
    assert kernels_of(copy.deepcopy(model)) == {"vision": "flash; sdpa where masked"}
    assert list(model.state_dict()) == list(Towers().state_dict())
    assert [told(kernel) for kernel in KERNELS.values()][2:] == ["xformers; sdpa where masked", "eager"]


@pytest.mark.parametrize("name", ["sdpa", "flash", "eager"])
def test_a_block_compiles_whole_with_its_kernel(name: Any) -> None:
    """No break of the graph, and the kernel that was chosen stands in it."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    block, x = a_block(), torch.randn(2, 5, 16)
    choose_attention(block, name, CPU)
    compiled = torch.compile(block, backend=keep, fullgraph=True)
    assert torch.allclose(compiled(x, causal=True), block(x, causal=True), atol=1e-6)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes]
    assert any("scaled_dot_product_attention" in call for call in calls) == (name != "eager")


def test_flash_is_refused_where_torch_has_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor has a flash kernel but none of cuDNN, which stands for a GPU without either."""
    block = a_block()
    choose_attention(block, "flash", CPU)
    attention.attempt.cache_clear()
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
    with pytest.raises(ConfigError, match="attention=flash cannot run here") as refusal:
        choose_attention(a_block(), "flash", CPU)
    assert "cpu, float32, 8 numbers a head" in str(refusal.value) and "attention=sdpa" in str(refusal.value)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="cpu, bfloat16"):
        choose_attention(a_block(), "flash", CPU)
    choose_attention(block, "sdpa", CPU)


def test_xformers_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install xformers"):
        attention.require("xformers")
    for name in ("sdpa", "flash", "eager"):
        attention.require(name)


def packages_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: object = None, op: object = None
) -> Tensor:
    """xformers' function by its documentation: [B, T, H, C], a lower triangle or nothing as bias."""
    scores = torch.einsum("bqhc,bthc->bhqt", query, key) / query.shape[-1] ** 0.5
    if attn_bias is not None:
        scores += torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
    return torch.einsum("bhqt,bthc->bqhc", scores.softmax(-1), value)


def test_xformers_is_called_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("xformers.ops")
    package.LowerTriangularMask, package.memory_efficient_attention = object, packages_attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", package)
    packed = torch.randn(2, 6, 3, 3, 4, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).tril(1)
    for hidden, causal in ((None, False), (None, True), (mask, False)):
        ours, torchs = (outcome(attend, packed, None, hidden, causal) for attend in (attention.xformers, sdpa))
        assert difference(ours, torchs) < 1e-13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_kernels_of_a_gpu_give_the_same_numbers(name: Any) -> None:
    if name == "xformers":
        pytest.importorskip("xformers")
    module = Attention(width=128, num_heads=2, depth=1).cuda()
    x, found = torch.randn(2, 50, 128, device="cuda"), []
    with torch.autocast("cuda", torch.bfloat16):
        for kernel in ("eager", name):
            choose_attention(module, kernel, x.device)
            found.append(module(x, causal=True).float())
    assert (found[0] - found[1]).abs().max() < 0.02 * found[0].abs().max()  # bf16: 8 bits
