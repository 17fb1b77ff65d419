"""Weights in 4 bits: the levels of the paper, what rounding costs, what is kept, and layers equal to unpacked ones."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlm_train.models.nf4 import BLOCK, LEVELS, NF4Linear, dequantized, quantized

WIDTHS = (1, 2, 48, 63, 64, 65, 130, 256)


def drawn(num_rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


def again(weight: Tensor) -> Tensor:
    """Quantised and back."""
    return dequantized(*quantized(weight), weight.shape[1])


def test_the_levels_are_quantiles_of_the_normal_distribution_as_the_paper_builds_them() -> None:
    """Section 3 and appendix E: means of neighbouring quantiles of each half, the outermost at probability
    1 - (1/32 + 1/30) / 2 = 0.9677083, and a zero. Measured 1.3e-7, the rounding of the table. The twins: levels of
    equal distance, and two that are swapped."""
    outer = 0.9677083
    above, below = (torch.special.ndtri(torch.linspace(outer, 0.5, n, dtype=torch.float64))[:-1] for n in (9, 8))
    built = torch.cat([-below, torch.zeros(1), above.flip(0)]) / above[0]
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    assert (built - levels).abs().max() < 1e-6 and len(LEVELS) == 16
    swapped = [*LEVELS[:3], LEVELS[4], LEVELS[3], *LEVELS[5:]]
    for twin in (torch.linspace(-1, 1, 16), torch.tensor(swapped)):
        assert (built - twin).abs().max() > 1e-2


@pytest.mark.parametrize("width", WIDTHS)
def test_a_weight_becomes_the_nearest_level_of_its_block(width: int) -> None:
    """Its error is the distance to the nearest of the 16 values of its block, so at most 0.1519 of the block's largest
    magnitude, half the widest gap. fp32: measured 1.2e-7 of weights up to 4. The twins: the magnitude of the
    neighbouring block, and two weights of a byte that are swapped."""
    weight = drawn(6, width)
    packed, absmax = quantized(weight)
    assert packed.shape == (6, -(-width // 2)) and packed.dtype == torch.uint8
    assert absmax.shape == (6, -(-width // BLOCK)) and absmax.dtype == torch.float32
    largest = torch.stack([block.abs().amax(1) for block in weight.split(BLOCK, dim=1)], dim=1)
    assert torch.equal(absmax, largest)
    values = torch.tensor(LEVELS)[None, None] * absmax.repeat_interleave(BLOCK, 1)[:, :width, None]
    nearest = (values - weight[..., None]).abs().amin(2)

    def excess(packed: Tensor, absmax: Tensor) -> float:
        return float(((dequantized(packed, absmax, width) - weight).abs() - nearest).abs().max())

    assert excess(packed, absmax) < 1e-6
    assert (nearest <= 0.152 * absmax.repeat_interleave(BLOCK, 1)[:, :width]).all()
    if width > BLOCK:
        assert excess(packed, absmax.roll(1, dims=1)) > 1e-2
    if width > 2:
        assert excess(packed << 4 | packed >> 4, absmax) > 1e-2


@settings(max_examples=60, deadline=None)
@given(width=st.sampled_from(WIDTHS), seed=st.integers(0, 99), exponent=st.integers(-30, 30), zeros=st.booleans())
def test_what_was_quantised_stays_as_it_is(width: int, seed: int, exponent: int, zeros: bool) -> None:
    """Equal to the last bit, for weights of any size, blocks of zeros among them."""
    weight = drawn(4, width, seed) * 10.0**exponent
    if zeros:
        weight[1, :BLOCK] = 0
    packed, absmax = quantized(weight)
    once = dequantized(packed, absmax, width)
    assert all(torch.equal(*pair) for pair in zip(quantized(once), (packed, absmax), strict=True))
    assert torch.equal(dequantized(packed, absmax.double(), width), once)  # as a model in fp64 holds it
    assert torch.equal(quantized(once.double())[0], packed)
    if zeros:
        assert not once[1, :BLOCK].any()


def test_what_is_no_number_does_not_become_one() -> None:
    for broken in (float("nan"), float("inf")):
        weight = drawn(2, 130)
        weight[0, 70] = broken
        found = again(weight)
        assert not found[0, 64:128].isfinite().all() and found[1].isfinite().all() and found[0, :64].isfinite().all()


def pair(bias: bool = True, width: int = 130) -> tuple[NF4Linear, nn.Linear]:
    """A quantised layer and one of the weights that it stands for."""
    torch.manual_seed(0)
    plain = nn.Linear(width, 24, bias=bias)
    packed = NF4Linear(plain)
    with torch.no_grad():
        plain.weight.copy_(again(plain.weight))
    return packed, plain


def run(layer: nn.Module, dtype: torch.dtype, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """What it gives and the gradient of what it reads, [2, 5, I]."""
    x = drawn(10, 130, seed=3).view(2, 5, 130).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_a_layer_is_one_with_the_weights_that_it_stands_for(
    bias: bool, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    """Equal to the last bit, in every precision of a run. The twins: magnitudes of neighbouring blocks, and swapped
    weights."""
    packed, plain = (layer.to(dtype) for layer in pair(bias))
    expected = run(plain, dtype, autocast)
    assert all(torch.equal(*both) for both in zip(run(packed, dtype, autocast), expected, strict=True))
    for part, change in (("absmax", lambda x: x.roll(1, dims=1)), ("weight", lambda x: x << 4 | x >> 4)):
        twin = copy.deepcopy(packed)
        twin.get_parameter(part).data = change(getattr(packed, part))
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(run(twin, dtype, autocast), expected, strict=True))


def test_nothing_of_a_layer_learns_and_its_bias_is_that_of_the_layer_before() -> None:
    packed, plain = pair()
    assert not packed.weight.requires_grad and not packed.absmax.requires_grad
    assert torch.equal(packed.bias, plain.bias) and (packed.in_features, packed.out_features) == (130, 24)
    state = torch.get_rng_state()
    NF4Linear(plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_state_is_plain_tensors_that_load_bit_by_bit() -> None:
    packed, _ = pair()
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.uint8, "absmax": torch.float32, "bias": torch.float32
    }  # fmt: skip
    shapes = NF4Linear(nn.Linear(130, 24, device="meta"))
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())
    shapes.to_empty(device="cpu").load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in shapes.state_dict().items())
    assert all(torch.equal(*both) for both in zip(run(shapes, torch.float32), run(packed, torch.float32), strict=True))
    bits = 8 * (packed.weight.numel() + 4 * packed.absmax.numel()) / (24 * 130)
    assert bits == pytest.approx(4 + 3 * 32 / 130)  # 4.5 where 64 divides the width


class Unpacked(NF4Linear):
    """The twin that keeps its dequantised weight until the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, dequantized(self.weight, self.absmax, self.in_features), self.bias)


@pytest.mark.parametrize(("kind", "is_light"), [(NF4Linear, True), (Unpacked, False)])
def test_no_dequantised_weight_is_alive_between_the_passes(kind: type[NF4Linear], is_light: bool) -> None:
    """Of 4 layers of 512 x 512 weights, 4 MiB in fp32, the graph keeps what the layers hold anyway, 0.6 MiB."""
    layers = nn.Sequential(*(kind(nn.Linear(512, 512)) for _ in range(4)))
    own = {tensor.untyped_storage().data_ptr() for tensor in layers.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = drawn(3, 512).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layers(x)
    added = sum(size for place, size in kept.items() if place not in own)
    assert added == (0 if is_light else 4 * 4 * 512 * 512)
    y.sum().backward()
    assert x.grad is not None
