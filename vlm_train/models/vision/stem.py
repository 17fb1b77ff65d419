"""Patches through a few small convolutions in place of one large one (Xiao et al. 2021, arXiv 2106.14881).

A patch's pixels are one linear map away from its token in a plain transformer; edges and corners must then be found by
attention. Three or four 3 x 3 convolutions of stride 2 see them at once, and training is shorter and less sensitive for
it. Norms are over groups of channels of one image, not over a batch, so that a sample's result is its own.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.layers import Linear, linear_flops

_GROUPS = 4


class ConvStem(nn.Module):
    """[B, 3, S, S] -> [B, P, D], P = (S / patch_size)^2; each halving doubles the channels, up to D.

    Args:
        patch_size: pixels a side of what becomes a token, a power of two.
        width: D, a multiple of 4 times half the patch size.

    Raises:
        ConfigError: other sizes.
    """

    def __init__(self, *, patch_size: int, width: int) -> None:
        super().__init__()
        num_halvings = int(math.log2(max(patch_size, 1)))
        if 2**num_halvings != patch_size or patch_size < 2 or width % (_GROUPS * patch_size // 2):
            raise ConfigError(
                "a convolutional stem cannot make such patches",
                got=f"patch_size={patch_size}, width={width}",
                allowed=f"a power of two from 2, and a width that {_GROUPS * max(patch_size // 2, 1)} divides",
                remedy="patch_size=8 width=192, or stem=patch",
            )
        channels = [3, *(width >> (num_halvings - 1 - level) for level in range(num_halvings))]
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(channels):
            self.layers.append(nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False))
            self.layers.append(nn.GroupNorm(_GROUPS, after))
            self.layers.append(nn.GELU())
        self.out = Linear(width, width, std=width**-0.5)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """The cast is for sharded low precision, which casts parameters but not the pixels made inside the model."""
        x_BDHW = self.layers(pixels_B3SS.to(self.out.weight.dtype))
        return self.out(x_BDHW.flatten(2).transpose(1, 2))

    def forward_flops(self, size: int) -> float:
        """FLOPs of one image of `size` pixels a side."""
        flops, side = 0.0, size
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                side //= 2
                flops += 2.0 * layer.weight.numel() * side * side
        return flops + linear_flops(self.out, side * side)
