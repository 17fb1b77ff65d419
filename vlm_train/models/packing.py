"""Texts one behind the other in a single row: no place is spent on padding, and no text sees another.

Everything in a language model but its attention works on a token alone, so it runs over all tokens of a batch at once.
Attention runs text by text: on a processor a call for each, with torch's own causal kernel; on a GPU in low precision
one call of torch's kernel for texts of any lengths (flash attention, arXiv 2205.14135; not yet run on a card). There is
no mask, of the padding or of the borders, that could be forgotten or take memory, and positions begin anew with each
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Where B texts lie in a row of N tokens. `lengths`: tokens of each, at least 1; `starts_B1` int32 [B + 1]: where
    each begins, and the end; `positions_N` int64: the place of each token in its text."""

    lengths: list[int]
    starts_B1: Tensor
    positions_N: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Texts:
        """Texts of so many tokens each."""
        sizes = torch.tensor(lengths, dtype=torch.int64)
        starts = F.pad(sizes.cumsum(0), (1, 0))
        positions = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(sizes)
        starts, positions = (x.to(device, non_blocking=True) for x in (starts.to(torch.int32), positions))
        return cls(lengths=list(lengths), starts_B1=starts, positions_N=positions)

    def places(self, num_tokens: int) -> Tensor:
        """Where the tokens of the row lie in a padded [B, T] of T = `num_tokens`, flattened: int64 [N]."""
        device = self.positions_N.device
        owner = torch.arange(len(self.lengths), device=device).repeat_interleave(
            self.starts_B1.diff().long(), output_size=len(self.positions_N)
        )
        return owner * num_tokens + self.positions_N


def attend_texts(
    q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor, texts: Texts, *, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention inside each text: [1, H, N, C], with H a multiple of the G heads of keys and values. `dropout`:
    probability with which a weight is left out."""
    if q_1HNC.is_cuda and q_1HNC.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _varlen(q_1HNC, k_1GNC, v_1GNC, texts, scale)
    is_grouped = q_1HNC.shape[1] != k_1GNC.shape[1]
    parts = (x.split(texts.lengths, dim=2) for x in (q_1HNC, k_1GNC, v_1GNC))
    read = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=is_grouped)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(read, dim=2)


def _varlen(q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor, texts: Texts, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q_NHC, k_NGC, v_NGC = (x.squeeze(0).transpose(0, 1).contiguous() for x in (q_1HNC, k_1GNC, v_1GNC))
    starts, longest = texts.starts_B1, max(texts.lengths)
    is_grouped = q_1HNC.shape[1] != k_1GNC.shape[1]
    read = varlen_attn(
        q_NHC, k_NGC, v_NGC, starts, starts, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=is_grouped,
    )  # fmt: skip
    assert isinstance(read, Tensor)
    return read.transpose(0, 1)[None]


ATTENTION = "vlm_train_texts"
"""The name by which transformers calls this attention. Where it was told of no texts, in generation, it is torch's."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    texts: Texts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `texts` comes from `CausalLanguageModel.forward`."""
    if texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    return attend_texts(query, key, value, texts, scale=scaling, dropout=dropout).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
