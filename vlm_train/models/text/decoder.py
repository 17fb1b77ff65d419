"""The multimodal decoder of CoCa: texts that look at their images (Yu et al. 2022, arXiv 2205.01917, 3.1).

It goes on from the tokens of a causal text tower. A layer is a causal block over the text, then a block whose queries
are the text's tokens and whose keys and values are the image's, as in open_clip; each has an MLP. What comes out at a
token is to tell the next one; the projection to a vocabulary is the model's.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vlm_train.models.layers import MLP, Activation, Attention, Block, linear_flops


class CrossBlock(nn.Module):
    """A causal block over the text, then x + attention(norm1(x) over norm_image(image)) and x + mlp(norm2(x))."""

    def __init__(
        self, *, width: int, num_heads: int, mlp_dim: int, activation: Activation, norm_eps: float, depth: int
    ) -> None:
        super().__init__()
        self.text = Block(
            width=width, num_heads=num_heads, mlp_dim=mlp_dim, activation=activation, norm_eps=norm_eps, depth=depth
        )
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.norm_image = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width=width, num_heads=num_heads, depth=depth)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width=width, mlp_dim=mlp_dim, activation=activation, depth=depth)

    def forward(self, x_BTD: Tensor, image_BQD: Tensor) -> Tensor:
        """Text [B, T, D] and image [B, Q, D] -> [B, T, D]."""
        x_BTD = self.text(x_BTD, causal=True)
        x_BTD = x_BTD + self.attention(self.norm_image(image_BQD), query_BQD=self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))

    def forward_flops(self, num_tokens: float, num_queries: float) -> float:
        """FLOPs of one text of `num_tokens` tokens with an image of `num_queries`."""
        width = self.norm1.normalized_shape[0]
        keys_values = 4.0 * width * width * num_queries
        per_token = 4.0 * width * width + 4.0 * num_queries * width
        mlp = linear_flops(self.mlp.fc1, num_tokens) + linear_flops(self.mlp.fc2, num_tokens)
        return self.text.forward_flops(num_tokens) + keys_values + per_token * num_tokens + mlp


class TextDecoder(nn.Module):
    """Text [B, T, D] and image [B, Q, D] -> [B, T, D], each token blind to those behind it.

    Args:
        width: D, the width of both.
        num_layers: number of layers, each of two blocks.
        num_heads: attention heads per block, a divisor of `width`.
        mlp_dim: hidden width of the MLPs; 4 * width unless given.
        activation: `gelu`, `gelu_tanh` or `quick_gelu`.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int | None = None,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.width = width
        mlp_dim = 4 * width if mlp_dim is None else mlp_dim
        self.blocks = nn.ModuleList(
            CrossBlock(
                width=width,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                activation=activation,
                norm_eps=norm_eps,
                depth=2 * num_layers,
            )
            for _ in range(num_layers)
        )
        self.post_norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x_BTD: Tensor, image_BQD: Tensor) -> Tensor:
        """Normalised at the end. Trailing padding of a text changes nothing before it."""
        for block in self.blocks:
            x_BTD = block(x_BTD, image_BQD)
        return self.post_norm(x_BTD)

    def forward_flops(self, num_tokens: float, num_queries: float) -> float:
        """Forward FLOPs of one text of `num_tokens` tokens with an image of `num_queries`."""
        return sum(cast(CrossBlock, block).forward_flops(num_tokens, num_queries) for block in self.blocks)
