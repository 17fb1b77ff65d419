"""The connector of BLIP-2: a Q-Former over the patches, then one linear (Li et al. 2023, arXiv 2301.12597).

The part of it that language models read: the queries. Its text half is not built, and it has no dropout (BLIP-2's
0.1), like every network of ours. BLIP-2 starts it from BERT's weights; here it starts anew.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlm_train.models.connectors.base import Connector, require_counts
from vlm_train.models.connectors.resampler import CrossAttention, QueryResampler
from vlm_train.models.layers import MLP, Attention, Linear, linear_flops

NORM_EPS = 1e-12  # BERT's


class QFormerBlock(nn.Module):
    """Queries look at each other, at the context if the block `looks`, then an MLP; each sum is normalised (post-norm,
    BERT's order)."""

    def __init__(self, *, width: int, context_dim: int, num_heads: int, looks: bool, depth: int) -> None:
        super().__init__()
        self.attention = Attention(width=width, num_heads=num_heads, depth=depth)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attention, self.norm_cross = None, None
        if looks:
            self.cross_attention = CrossAttention(
                width=width,
                context_dim=context_dim,
                num_heads=num_heads,
                head_dim=width // num_heads,
                num_kv_heads=num_heads,
                bias=True,
                depth=depth,
            )
            self.norm_cross = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width=width, mlp_dim=4 * width, activation="gelu", depth=depth)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, query_NQD: Tensor, context_NPC: Tensor) -> Tensor:
        """Queries [N, Q, D] and context [N, P, C] -> queries [N, Q, D]."""
        query_NQD = self.norm1(query_NQD + self.attention(query_NQD))
        if self.cross_attention is not None and self.norm_cross is not None:
            query_NQD = self.norm_cross(query_NQD + self.cross_attention(query_NQD, context_NPC))
        return self.norm2(query_NQD + self.mlp(query_NQD))

    def forward_flops(self, num_queries: float, num_tokens: float) -> float:
        """FLOPs of one row of `num_queries` queries and a context of `num_tokens`."""
        linears = (self.attention.qkv, self.attention.out, self.mlp.fc1, self.mlp.fc2)
        flops = sum(linear_flops(linear, num_queries) for linear in linears)
        flops += 4.0 * num_queries**2 * self.attention.out.in_features
        if self.cross_attention is not None:
            flops += self.cross_attention.forward_flops(num_queries, num_tokens)
        return flops


class QFormerConnector(Connector):
    """`num_queries` queries in a transformer of their own, whose every second layer, from the first on, looks at the
    patches; then a linear to the language model's width.

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model.
        num_patches: P of one image.
        num_queries: tokens that an image becomes.
        num_layers: layers of the transformer.
        num_heads: attention heads of a layer, a divisor of `width`.
        width: of the transformer.

    Raises:
        ConfigError: no query, layer or head, or heads that do not divide the width.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_patches: int,
        num_queries: int = 32,
        num_layers: int = 12,
        num_heads: int = 12,
        width: int = 768,
    ) -> None:
        super().__init__()
        require_counts({"num_queries": num_queries, "num_layers": num_layers, "num_heads": num_heads})
        self.num_patches, self.num_tokens = num_patches, num_queries
        self.resampler = QueryResampler(
            num_queries=num_queries,
            width=width,
            blocks=[
                QFormerBlock(
                    width=width, context_dim=in_dim, num_heads=num_heads, looks=layer % 2 == 0, depth=num_layers
                )
                for layer in range(num_layers)
            ],
            mean=0.0,
            std=0.02,
            norm_first=nn.LayerNorm(width, eps=NORM_EPS),
        )
        self.project = Linear(width, out_dim, std=width**-0.5)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, num_queries, D]."""
        return self.project(self.resampler(x_NPD))

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        return self.resampler.forward_flops(self.num_patches) + linear_flops(self.project, self.num_tokens)
