"""The image tower of CoCa: a vision transformer under two attentional poolers (Yu et al. 2022, arXiv 2205.01917, 3.2).

1. The generative pooler's queries read every token of the transformer: what a caption is written from.
2. The contrastive pooler's one query reads these: one vector for the image. (The paper's cascade; open_clip's
   `attentional_pool: cascade`.)

Both are one attention without an MLP. Queries and tokens are normalised by themselves before they meet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.layers import Attention
from vlm_train.models.vision.vit import VisionTransformer


class QueryPool(nn.Module):
    """Learned queries read a sequence: [B, T, D] -> [B, Q, out_dim]."""

    def __init__(self, *, width: int, num_queries: int, num_heads: int, norm_eps: float, out_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.norm_query = nn.LayerNorm(width, eps=norm_eps)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width=width, num_heads=num_heads, depth=1, out_dim=out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The queries start normal(0, 1), as their norm leaves them."""
        nn.init.normal_(self.query)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each row by the same queries."""
        query_BQD = self.norm_query(self.query).expand(x_BTD.shape[0], -1, -1)
        return self.attention(self.norm(x_BTD), query_BQD=query_BQD)

    def forward_flops(self, num_tokens: float) -> float:
        """FLOPs of one row of `num_tokens` tokens."""
        num_queries, width = self.query.shape
        keys_values = 4.0 * width * width * num_tokens
        per_query = 2.0 * width * (width + self.attention.out.out_features) + 4.0 * num_tokens * width
        return keys_values + per_query * num_queries


class PooledVision(nn.Module):
    """Image tower: normalised pixels [B, 3, S, S] -> one vector [B, width], and `num_queries` tokens beside it.

    Args:
        tower: a transformer whose own pooling is not used; `pool: cls` puts a class token among its tokens.
        width: D of the vector and of the tokens, also `out_dim`. A decoder must have it too.
        num_queries: Q, the tokens that are left of an image.
        num_heads: attention heads of both poolers, a divisor of `width` and of the tower's width.
        norm_eps: epsilon of the poolers' layer norms.

    Raises:
        ConfigError: no query, or a tower that pools by attention itself.
    """

    def __init__(
        self,
        *,
        tower: VisionTransformer,
        width: int,
        num_queries: int = 256,
        num_heads: int = 8,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_queries < 1 or tower.pool == "map":
            raise ConfigError(
                "the poolers of an image do not fit its transformer",
                got=f"num_queries={num_queries}, tower.pool={tower.pool}",
                allowed="at least one query; cls or mean",
                remedy="set model.vision.num_queries=256 and model.vision.tower.pool=cls",
            )
        self.image_spec, self.num_patches = tower.image_spec, tower.num_patches
        self.out_dim, self.num_queries = width, num_queries
        self.tower = tower
        self.generative_pool = QueryPool(
            width=tower.out_dim, num_queries=num_queries, num_heads=num_heads, norm_eps=norm_eps, out_dim=width
        )
        self.contrastive_pool = QueryPool(
            width=width, num_queries=1, num_heads=num_heads, norm_eps=norm_eps, out_dim=width
        )

    def forward(self, pixels_B3SS: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] normalised -> [B, D], not L2-normalised; `kept_BK` int64: the only patches that are read."""
        return self.states(pixels_B3SS, kept_BK)[0]

    def states(self, pixels_B3SS: Tensor, kept_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` returns [B, D], and the tokens of the generative pooler [B, Q, D]."""
        tokens_BQD = self.generative_pool(self.tower.tokens(pixels_B3SS, kept_BK))
        return self.contrastive_pool(tokens_BQD).squeeze(1), tokens_BQD

    def forward_flops(self, num_kept: int | None = None) -> float:
        """Forward FLOPs of one image of which `num_kept` patches are read (default: all)."""
        pooled = self.generative_pool.forward_flops(self.tower.num_tokens(num_kept))
        return self.tower.tokens_flops(num_kept) + pooled + self.contrastive_pool.forward_flops(self.num_queries)
