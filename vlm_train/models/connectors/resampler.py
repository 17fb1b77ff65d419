"""Learned queries that read the patches of an image through a stack of blocks: what perceiver and Q-Former share.

They differ in their block alone: in what its queries look at, and where it normalises. (`vision.pooled.QueryPool` and
`layers.AttentionPool` are one attention each, and no stack.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.attention import Attend, sdpa
from vlm_train.models.layers import Linear, linear_flops


class QueryBlock(Protocol):
    """One layer of a resampler, an `nn.Module`."""

    def __call__(self, query_NQD: Tensor, context_NPC: Tensor) -> Tensor:
        """Queries [N, Q, D] and context [N, P, C] -> queries [N, Q, D]."""

    def forward_flops(self, num_queries: float, num_tokens: float) -> float:
        """FLOPs of one row of `num_queries` queries and a context of `num_tokens`."""


class QueryResampler(nn.Module):
    """Any number of tokens [N, P, C] -> [N, Q, D]: the same learned queries for each row, changed by block after block.

    Args:
        num_queries: Q.
        width: D of the queries.
        blocks: the layers, each a `QueryBlock`.
        mean, std: of the normal from which the queries start.
        norm_first: what is done to the queries before the first block, if anything.
        norm_last: what is done to them behind the last, if anything.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        width: int,
        blocks: Iterable[nn.Module],
        mean: float,
        std: float,
        norm_first: nn.Module | None = None,
        norm_last: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.norm_first, self.norm_last = norm_first, norm_last
        self.blocks = nn.ModuleList(blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The queries start normal(mean, std)."""
        nn.init.normal_(self.query, mean=self.mean, std=self.std)

    def forward(self, context_NPC: Tensor) -> Tensor:
        """[N, P, C] -> [N, Q, D]."""
        query_QD = self.query if self.norm_first is None else self.norm_first(self.query)
        # copies: torch's counter of FLOPs cannot follow a parameter's view
        query_NQD = query_QD.repeat(len(context_NPC), 1, 1)
        for block in self.blocks:
            query_NQD = block(query_NQD, context_NPC)
        return query_NQD if self.norm_last is None else self.norm_last(query_NQD)

    def forward_flops(self, num_tokens: float) -> float:
        """FLOPs of one row of `num_tokens` tokens."""
        num_queries = len(self.query)
        return sum(cast(QueryBlock, block).forward_flops(num_queries, num_tokens) for block in self.blocks)


class CrossAttention(nn.Module):
    """Queries read a context that may have another width, with heads of any size, of which several may share one head
    of keys and values (Ainslie et al. 2023, arXiv 2305.13245). Keys and values are one packed linear, keys first.

    Args:
        width: D of the queries, read and written.
        context_dim: C of the context.
        num_heads: H.
        head_dim: numbers of one head.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`.
        bias: whether the linears have one.
        depth: layers of the stack, by which what is written starts smaller.

    Raises:
        ConfigError: heads that cannot be shared evenly.
    """

    def __init__(
        self, *, width: int, context_dim: int, num_heads: int, head_dim: int, num_kv_heads: int, bias: bool, depth: int
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ConfigError(
                "the heads of keys and values must be shared evenly",
                got=f"num_heads={num_heads}, num_kv_heads={num_kv_heads}",
                allowed=f"a divisor of {num_heads}",
                remedy=f"set model.connector.num_kv_heads={num_heads}",
            )
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.attend: Attend = sdpa
        inner = num_heads * head_dim
        self.query = Linear(width, inner, bias=bias, std=width**-0.5)
        self.key_value = Linear(context_dim, 2 * num_kv_heads * head_dim, bias=bias, std=context_dim**-0.5)
        self.out = Linear(inner, width, bias=bias, std=(2 * depth * inner) ** -0.5)

    def forward(self, query_NQD: Tensor, context_NPC: Tensor) -> Tensor:
        """[N, Q, D] and [N, P, C] -> [N, Q, D]."""
        q = self.query(query_NQD).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        key_value = self.key_value(context_NPC).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        k, v = key_value.permute(2, 0, 3, 1, 4).unbind()
        if self.num_kv_heads < self.num_heads:
            k, v = (part.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for part in (k, v))
        return self.out(self.attend(q, k, v, mask=None, causal=False).transpose(1, 2).flatten(2))

    def forward_flops(self, num_queries: float, num_tokens: float) -> float:
        """FLOPs of one row of `num_queries` queries and a context of `num_tokens`."""
        linears = linear_flops(self.query, num_queries) + linear_flops(self.out, num_queries)
        products = 4.0 * num_queries * num_tokens * self.num_heads * self.head_dim
        return linears + linear_flops(self.key_value, num_tokens) + products
