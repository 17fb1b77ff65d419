"""Text transformer, general enough to hold the text towers of CLIP, open_clip and SigLIP exactly.

1. Embed ids, add learned positions.
2. Run the blocks: `causal` hides the future, otherwise the padding is hidden. Either way trailing padding cannot
   change the result, so a batch may be trimmed to its longest text. The exception is `pool: last` (SigLIP), which by
   design reads the last position of a text padded to the full length.
3. Normalise and pool: `eos` the first end-of-text token, `last` the last position, `mean` the average real token,
   `cls` a learned token right behind the text. It has no position of its own: a text ends anywhere, so its vector says
   both. Standing behind, it needs no mask: causality keeps it from the tokens, and the padding from it.

Sources: Radford et al. 2021 (causal, eos); Zhai et al. 2023 (not causal, last); Yu et al. 2022, arXiv 2205.01917 (cls).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.adapt import resized_sequence
from vlm_train.models.layers import Activation, Embedding, blocks_flops, make_blocks, run_blocks, take
from vlm_train.types import TextSpec


class TextTransformer(nn.Module):
    """Text tower: ids [B, T] and mask [B, T] -> one vector per text [B, D].

    Args:
        spec: what the tokenizer produces (given by the build, not by the config).
        width: D, also `out_dim`.
        num_layers: number of blocks.
        num_heads: attention heads per block, a divisor of `width`.
        mlp_dim: hidden width of the MLPs; 4 * width unless given.
        activation: `gelu`, `gelu_tanh` or `quick_gelu`.
        norm_eps: epsilon of the layer norms (CLIP 1e-5, SigLIP 1e-6).
        pool: `eos`, `last`, `mean` or `cls`.
        causal: each token sees itself and what is before it.

    Raises:
        ConfigError: an unknown pool; `last` with a tokenizer that does not pad to the full length; `eos` with one that
            begins texts with the same token; `cls` without `causal`.
    """

    def __init__(
        self,
        *,
        spec: TextSpec,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int | None = None,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        pool: Literal["eos", "last", "mean", "cls"] = "eos",
        causal: bool = True,
    ) -> None:
        super().__init__()
        _check_pool(pool, spec, causal=causal)
        self.text_spec, self.out_dim, self.pool, self.causal = spec, width, pool, causal
        mlp_dim = 4 * width if mlp_dim is None else mlp_dim
        self.token_embedding = Embedding(spec.vocab_size, width)
        self.position = nn.Parameter(torch.empty(spec.context_length, width))
        self.class_token = nn.Parameter(torch.empty(width)) if pool == "cls" else None
        self.blocks = make_blocks(
            num_layers, width=width, num_heads=num_heads, mlp_dim=mlp_dim, activation=activation, norm_eps=norm_eps
        )
        self.post_norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions start normal(0, 0.01), a class token like any other, normal(0, 0.02)."""
        nn.init.normal_(self.position, std=0.01)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """ids [B, T] int64, mask [B, T] bool (True on real tokens, padding behind) -> [B, D], not L2-normalised.

        Raises:
            ConfigError: T longer than the context, or for `pool: last` not the whole of it.
        """
        x_BTD = self._embed(ids_BT, mask_BT)
        key_mask = None if self.causal or self.pool == "last" else mask_BT[:, None, None, :]
        read_B = self._read_position(ids_BT, mask_BT)
        x_BTD = self.post_norm(run_blocks(self.blocks, x_BTD, mask=key_mask, causal=self.causal, read_B=read_B))
        if read_B is not None:
            return x_BTD.squeeze(1)
        weights_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
        return (x_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)

    def states(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Of a causal tower that reads one position: what `forward` returns [B, D], and every token behind the last
        block [B, T, D], not normalised, for a decoder to go on from."""
        read_B = self._read_position(ids_BT, mask_BT)
        assert self.causal and read_B is not None
        x_BTD = run_blocks(self.blocks, self._embed(ids_BT, mask_BT), causal=True, read_B=None)
        return self.post_norm(take(x_BTD, read_B)).squeeze(1), x_BTD[:, : ids_BT.shape[1]]

    def _embed(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, T, D]; with a class token [B, T + 1, D], it stands where the padding of a text begins."""
        num_tokens = ids_BT.shape[1]
        self._check_length(num_tokens)
        x_BTD = self.token_embedding(ids_BT) + self.position[:num_tokens]
        if self.class_token is None:
            return x_BTD
        is_class = torch.arange(num_tokens + 1, device=ids_BT.device) == mask_BT.sum(dim=1, keepdim=True)
        return torch.where(is_class[:, :, None], self.class_token, F.pad(x_BTD, (0, 0, 0, 1)))

    def resized_position(self, position_TD: Tensor) -> Tensor:
        """The positions of a tower for texts of another length, at the length of this one."""
        return resized_sequence(position_TD, self.position)

    def _read_position(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor | None:
        """The position [B] that the pooling reads; None when it reads every token.

        Argmax returns the first of equals, so a padding id equal to the end id does no harm.
        """
        if self.pool == "eos":
            return (ids_BT == self.text_spec.eos_id).int().argmax(dim=1)
        if self.pool == "last":
            return torch.full_like(ids_BT[:, 0], ids_BT.shape[1] - 1)
        return mask_BT.sum(dim=1) if self.pool == "cls" else None

    def _check_length(self, num_tokens: int) -> None:
        context = self.text_spec.context_length
        if num_tokens > context or (self.pool == "last" and num_tokens != context):
            raise ConfigError(
                "a batch of texts does not have the length that the text tower reads",
                got=f"{num_tokens} tokens",
                allowed=f"exactly {context}" if self.pool == "last" else f"at most {context}",
                remedy="use the tokenizer that this model was built with",
            )

    def forward_flops(self, num_tokens: float) -> float:
        """Forward FLOPs of one text of `num_tokens` tokens, as executed (all but `mean` end with one query)."""
        return blocks_flops(self.blocks, num_tokens + (self.pool == "cls"), reads_one=self.pool != "mean")

    def states_flops(self, num_tokens: float) -> float:
        """As `forward_flops`, of `states`."""
        return blocks_flops(self.blocks, num_tokens + (self.pool == "cls"), reads_one=False)


def _check_pool(pool: str, spec: TextSpec, *, causal: bool) -> None:
    if pool not in ("eos", "last", "mean", "cls"):
        raise ConfigError(
            "unknown pooling of a text transformer",
            got=pool,
            allowed=["eos", "last", "mean", "cls"],
            remedy="set model.text.pool=eos",
        )
    if pool == "cls" and not causal:
        raise ConfigError(
            "the class token of a text stands where its padding begins, which only a causal tower keeps apart",
            got="pool=cls, causal=false",
            allowed="pool=cls with causal=true; pool=mean with either",
            remedy="set model.text.causal=true",
        )
    if pool == "eos" and spec.eos_id == spec.bos_id:
        raise ConfigError(
            "the first end-of-text token of every text would be the one it begins with",
            got=f"pool=eos with a tokenizer that begins and ends texts with token {spec.eos_id}",
            allowed="pool=mean, or a tokenizer with two different tokens",
            remedy="set model.text.pool=mean and model.text.causal=false",
        )
    if pool == "last" and not spec.pad_to_max:
        raise ConfigError(
            "a text tower that pools the last position needs texts padded to the full length",
            got="pool=last with a tokenizer whose spec has pad_to_max=False",
            allowed="pool=last with pad_to_max=True; pool=eos or pool=mean with either",
            remedy="set model.text.pool=eos, or pad_to_max=true in the tokenizer",
        )
