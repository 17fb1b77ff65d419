"""The connector of Idefics2: a gated projection, then a perceiver resampler (Laurençon et al., arXiv 2405.02246)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.models.connectors.base import Connector, require_counts
from vlm_train.models.connectors.resampler import CrossAttention, QueryResampler
from vlm_train.models.layers import Linear, linear_flops

NORM_EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """In the precision of its weight, as autocast has it for a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return super().forward(x.to(self.weight.dtype))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (Shazeer 2020, arXiv 2002.05202).

    Args:
        in_dim: what is read.
        mlp_dim: hidden width.
        out_dim: what is written.
        std: of the initial weights that write.
    """

    def __init__(self, *, in_dim: int, mlp_dim: int, out_dim: int, std: float) -> None:
        super().__init__()
        self.gate = Linear(in_dim, mlp_dim, bias=False, std=in_dim**-0.5)
        self.up = Linear(in_dim, mlp_dim, bias=False, std=in_dim**-0.5)
        self.down = Linear(mlp_dim, out_dim, bias=False, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def forward_flops(self, num_rows: float) -> float:
        """FLOPs over `num_rows` rows."""
        return sum(linear_flops(linear, num_rows) for linear in (self.gate, self.up, self.down))


class PerceiverBlock(nn.Module):
    """Latents read the context and themselves, then a gated MLP; both add to the latents, and read them normalised."""

    def __init__(self, *, width: int, num_heads: int, head_dim: int, num_kv_heads: int, depth: int) -> None:
        super().__init__()
        self.norm_query = RMSNorm(width)
        self.norm_context = RMSNorm(width)
        self.attention = CrossAttention(
            width=width,
            context_dim=width,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            bias=False,
            depth=depth,
        )
        self.norm_mlp = RMSNorm(width)
        self.mlp = GatedMLP(in_dim=width, mlp_dim=4 * width, out_dim=width, std=(8 * depth * width) ** -0.5)

    def forward(self, query_NQD: Tensor, context_NPC: Tensor) -> Tensor:
        """Latents [N, Q, D] and context [N, P, D] -> latents [N, Q, D]."""
        h_NQD = self.norm_query(query_NQD)
        keys_NTD = torch.cat([self.norm_context(context_NPC), h_NQD], dim=1)
        query_NQD = query_NQD + self.attention(h_NQD, keys_NTD)
        return query_NQD + self.mlp(self.norm_mlp(query_NQD))

    def forward_flops(self, num_queries: float, num_tokens: float) -> float:
        """FLOPs of one row of `num_queries` latents and a context of `num_tokens`."""
        attention = self.attention.forward_flops(num_queries, num_tokens + num_queries)
        return attention + self.mlp.forward_flops(num_queries)


class ProjectedPerceiver(Connector):
    """What perceivers share: patches through a gated MLP to the language model's width, where latents read them.

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model.
        num_patches: P of one image.
        num_latents: tokens that an image becomes.
        num_layers: blocks of the resampler.
        heads: `num_heads`, `head_dim` and `num_kv_heads` of a block.
        mlp_dim: hidden width of the projection, 4 * `out_dim` where None.
        resampler: makes it of its blocks.

    Raises:
        ConfigError: no latent, layer or head, or heads that cannot be shared evenly.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_patches: int,
        num_latents: int,
        num_layers: int,
        heads: Mapping[str, int],
        mlp_dim: int | None,
        resampler: Callable[[list[nn.Module]], QueryResampler],
    ) -> None:
        super().__init__()
        require_counts({"num_latents": num_latents, "num_layers": num_layers, **heads})
        self.num_patches, self.num_tokens = num_patches, num_latents
        mlp_dim = 4 * out_dim if mlp_dim is None else mlp_dim
        self.project = GatedMLP(in_dim=in_dim, mlp_dim=mlp_dim, out_dim=out_dim, std=mlp_dim**-0.5)
        self.resampler = resampler(
            [PerceiverBlock(width=out_dim, depth=num_layers, **heads) for _ in range(num_layers)]
        )

    def forward(self, x_NPD: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, num_latents, D]."""
        return self.resampler(self.project(x_NPD))

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        return self.project.forward_flops(self.num_patches) + self.resampler.forward_flops(self.num_patches)


class PerceiverConnector(ProjectedPerceiver):
    """Patches through a gated MLP to the language model's width, where `num_latents` latents read them.

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model.
        num_patches: P of one image.
        num_latents: tokens that an image becomes.
        num_layers: blocks of the resampler.
        num_heads: attention heads of a block.
        head_dim: numbers of one head; heads need not make up the width.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`.
        mlp_dim: hidden width of the projection, 4 * `out_dim` unless given; in Idefics2 that of the language model.
        latent_std: the latents start normal(1, latent_std). With 0, as in transformers, an untrained connector gives
            one token `num_latents` times, which only a reader that tells positions apart can pull asunder; latents
            that are nearly alike part slowly, too.

    Raises:
        ConfigError: no latent, layer or head, or heads that cannot be shared evenly.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_patches: int,
        num_latents: int = 64,
        num_layers: int = 3,
        num_heads: int = 16,
        head_dim: int = 96,
        num_kv_heads: int = 4,
        mlp_dim: int | None = None,
        latent_std: float = 1.0,
    ) -> None:
        super().__init__(
            in_dim=in_dim,
            out_dim=out_dim,
            num_patches=num_patches,
            num_latents=num_latents,
            num_layers=num_layers,
            heads={"num_heads": num_heads, "head_dim": head_dim, "num_kv_heads": num_kv_heads},
            mlp_dim=mlp_dim,
            resampler=lambda blocks: QueryResampler(
                num_queries=num_latents,
                width=out_dim,
                blocks=blocks,
                mean=1.0,
                std=latent_std,
                norm_last=RMSNorm(out_dim),
            ),
        )
