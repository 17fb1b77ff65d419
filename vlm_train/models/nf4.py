"""Linear layers whose weights are kept in 4-bit NormalFloat, NF4, and do not learn (QLoRA, Dettmers et al. 2023,
arXiv 2305.14314).

Each row of a weight is cut into blocks of 64. A block is kept as its largest magnitude and, of each of its weights, the
number of the level that is nearest to the weight over that magnitude: 4 bits a weight and 32 a block, 4.5 a weight
together. The magnitudes are not quantised again. Blocks end with their row, so that rows can be shared out among ranks.

The weights that are meant are `dequantized`, fp32 products of a level and a magnitude, whatever precision computes.
They exist while a layer computes: the backward pass forms them again, from what is kept anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4 in order, as in appendix E of the paper."""

BLOCK = 64
"""Weights that share a magnitude, as in the paper."""


class NF4Linear(nn.Linear):
    """A linear layer with the weights of `linear`, quantised, and its bias as it is.

    `weight` [O, ceil(I / 2)] uint8 and `absmax` [O, ceil(I / 64)] fp32: see `quantized`. Both are parameters, so that
    FSDP2 shards them and DistributedDataParallel sends them once and not with every step, as it does with buffers.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would draw weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed_OP, absmax_OG = quantized(linear.weight.detach())
        self.weight = nn.Parameter(packed_OP, requires_grad=False)
        self.absmax = nn.Parameter(absmax_OG, requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]. Gradients reach the input alone."""
        output: Tensor = _Product.apply(input, self.weight, self.absmax, self.bias)
        return output


class _Product(torch.autograd.Function):
    """What `F.linear` gives, under autocast too, without keeping a dequantised weight until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed_OP: Tensor, absmax_OG: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed_OP, absmax_OG)
        ctx.input = x.dtype, x.shape[-1]
        return F.linear(x, dequantized(packed_OP, absmax_OG, x.shape[-1]).to(x.dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dtype, width = ctx.input
        packed_OP, absmax_OG = ctx.saved_tensors
        weight_OI = dequantized(packed_OP, absmax_OG, width).to(grad.dtype)
        return (grad @ weight_OI).to(dtype), None, None, None


@torch.no_grad()
def quantized(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [O, I], read as fp32 -> numbers of levels [O, ceil(I / 2)] uint8, the first of two in the upper half of
    its byte, and the largest magnitude of each block [O, ceil(I / 64)] fp32. A row is filled up with zeros."""
    width = weight_OI.shape[1]
    blocks_OGB = F.pad(weight_OI.float(), (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    absmax_OG = blocks_OGB.abs().amax(dim=2)
    shares_OGB = blocks_OGB / absmax_OG.where(absmax_OG != 0, 1.0)[..., None]  # a block of zeros stays one
    levels = torch.tensor(LEVELS, device=weight_OI.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes_OI = torch.bucketize(shares_OGB, borders, out_int32=True).to(torch.uint8).flatten(1)
    packed_OP = codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]
    return packed_OP[:, : -(-width // 2)].contiguous(), absmax_OG


@torch.no_grad()
def dequantized(packed_OP: Tensor, absmax_OG: Tensor, width: int) -> Tensor:
    """What `quantized` gave of weights [O, I = width] -> these, [O, I] fp32, each a level times its block's magnitude.

    Of values that this function gave, `quantized` gives what they were made of.
    """
    num_rows, num_blocks = absmax_OG.shape
    filled_OP = F.pad(packed_OP, (0, num_blocks * BLOCK // 2 - packed_OP.shape[1]))
    blocks_OGB = F.embedding(filled_OP.int(), _pairs(packed_OP.device)).view(num_rows, num_blocks, BLOCK)
    return blocks_OGB.mul_(absmax_OG.float()[..., None]).flatten(1)[:, :width]


def num_weights(module: nn.Module) -> int:
    """Numbers in the parameters of `module`; quantised weights count as the weights that they stand for."""
    layers = [layer for layer in module.modules() if isinstance(layer, NF4Linear)]
    packed = sum(layer.weight.numel() + layer.absmax.numel() for layer in layers)
    meant = sum(layer.out_features * layer.in_features for layer in layers)
    return sum(parameter.numel() for parameter in module.parameters()) - packed + meant


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2] fp32: the two levels that a byte stands for."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return torch.cartesian_prod(levels, levels)
