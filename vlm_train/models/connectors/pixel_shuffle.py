"""The connector of Idefics3 and SmolVLM: fewer, wider patches, then one linear."""

from __future__ import annotations

import math

from torch import Tensor

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.base import Connector, require_counts
from vlm_train.models.layers import Linear, linear_flops


class PixelShuffleConnector(Connector):
    """`factor` x `factor` neighbouring patches become one token, through one linear without bias.

    The channels of a token are those of its patches, row by row; tokens stand in rows too. So in Idefics3 (Laurençon et
    al. 2024, arXiv 2408.12637), SmolVLM and nanoVLM; the first shuffle of InternVL numbers tokens by columns.

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model.
        num_patches: P of one image, a square whose side is a multiple of `factor`.
        factor: side of the square of patches that one token takes in.

    Raises:
        ConfigError: patches that are no square, or cannot be cut so.
    """

    keeps_places = True

    def __init__(self, *, in_dim: int, out_dim: int, num_patches: int, factor: int = 2) -> None:
        super().__init__()
        require_counts({"factor": factor})
        side = math.isqrt(num_patches)
        if side**2 != num_patches or side % factor:
            raise ConfigError(
                "the patches of an image cannot be joined by pixel shuffle",
                got=f"{num_patches} patches, model.connector.factor={factor}",
                allowed="a square of patches, without a class token, whose side is a multiple of the factor",
                remedy="an image side that is a multiple of factor times the patch side, or another connector",
            )
        self.side, self.factor = side // factor, factor
        self.num_tokens = self.side**2
        width = factor**2 * in_dim
        self.project = Linear(width, out_dim, bias=False, std=width**-0.5)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, P / factor^2, D]."""
        return self.project(self.shuffle(x_NPD))

    def shuffle(self, x_NPD: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, P / factor^2, factor^2 Dv]."""
        x_NYFXFD = x_NPD.unflatten(1, (self.side, self.factor, self.side, self.factor))
        return x_NYFXFD.transpose(2, 3).flatten(3).flatten(1, 2)

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        return linear_flops(self.project, self.num_tokens)
