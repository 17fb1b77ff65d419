"""A dual encoder that also writes: the model of CoCa (Yu et al. 2022, arXiv 2205.01917).

The towers of a dual encoder show their tokens beside their vectors, and a decoder goes on from both: so one pass serves
the contrast and the caption. Alone, for retrieval, the towers are a dual encoder like any other.

The vocabulary's logits are never formed here. They are `caption_hidden @ caption_vocabulary.T`, V numbers for each
token, so the objective forms them where a label is, some at a time (`objectives.token_nll`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from vlm_train.errors import ConfigError
from vlm_train.models.dual_encoder import DualEncoder, TextTower, VisionTower
from vlm_train.models.layers import Linear, linear_flops
from vlm_train.models.text.decoder import TextDecoder
from vlm_train.types import Batch, Outputs


class TokenVision(VisionTower, Protocol):
    """An image tower that shows its tokens; `models.vision.pooled` is one."""

    num_queries: int

    def states(self, pixels_B3SS: Tensor, kept_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Its vector [B, out_dim], and tokens [B, Q, out_dim]."""


class TokenText(TextTower, Protocol):
    """A causal text tower that shows its tokens."""

    def states(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Its vector [B, out_dim], and the tokens [B, T, out_dim] behind its last block."""

    def states_flops(self, num_tokens: float) -> float:
        """Forward FLOPs of one text of `num_tokens` tokens."""


class Captioner(DualEncoder):
    """Image and text towers into a common space, and a decoder that tells each next token of a text from its image.

    Args:
        vision: image tower with tokens.
        text: causal text tower with a class token, whose vector is that of the text.
        decoder: what goes on from their tokens; all three have one width.
        embed_dim: E, the width of the common space.
        patch_dropout: see `DualEncoder`.

    Raises:
        ConfigError: towers without tokens, or of another width than the decoder's.
    """

    outputs = frozenset({"image_features", "text_features", "caption_hidden", "caption_vocabulary"})
    part_inputs: Mapping[str, Sequence[str]] = {"decoder": ("vision", "text")}  # as of `GenerativeModel`
    vision: TokenVision
    text: TokenText

    def __init__(
        self,
        *,
        vision: TokenVision,
        text: TokenText,
        decoder: TextDecoder,
        embed_dim: int,
        patch_dropout: float = 0.0,
    ) -> None:
        _check_parts(vision, text, decoder)
        super().__init__(vision=vision, text=text, embed_dim=embed_dim, patch_dropout=patch_dropout)
        self.decoder = decoder
        self.vocabulary = Linear(decoder.width, text.text_spec.vocab_size, bias=False, std=decoder.width**-0.5)

    def forward(self, batch: Batch) -> Outputs:
        """As `DualEncoder.forward`, and `caption_hidden` [B, T, D], which at each token is to tell the next one, by
        the rows of `caption_vocabulary` [V, D].

        Texts beyond the images (hard captions) describe none, and are not decoded.
        """
        vector_BD, image_BQD = self.vision.states(self.pixels(batch["images"]), self.kept(batch))
        text_BD, tokens_BTD = self.text.states(batch["text_ids"], batch["text_mask"])
        return {
            "image_features": self.project_image(vector_BD),
            "text_features": self.project_text(text_BD),
            "caption_hidden": self.decoder(tokens_BTD[: len(image_BQD)], image_BQD),
            # a copy, since sharded strategies put hooks on what a model returns, and on a parameter they would stay
            "caption_vocabulary": self.vocabulary.weight.clone(),
        }

    def forward_flops(self, num_text_tokens: float) -> dict[str, float]:
        """As `DualEncoder.forward_flops`, with `decoder`, which includes the logits of each token that has a next."""
        flops = super().forward_flops(num_text_tokens)
        flops["text"] = self.text.states_flops(num_text_tokens) + linear_flops(self.text_projection, 1)
        logits = linear_flops(self.vocabulary, num_text_tokens - 1)
        return {**flops, "decoder": self.decoder.forward_flops(num_text_tokens, self.vision.num_queries) + logits}


def _check_parts(vision: TokenVision, text: TokenText, decoder: TextDecoder) -> None:
    widths = (vision.out_dim, text.out_dim, decoder.width)
    if not (hasattr(vision, "states") and getattr(text, "pool", None) == "cls" and len(set(widths)) == 1):
        raise ConfigError(
            "the decoder cannot go on from these towers",
            got=f"{type(vision).__name__} of width {widths[0]}, {type(text).__name__} of width {widths[1]} with "
            f"pool={getattr(text, 'pool', None)}, a decoder of width {widths[2]}",
            allowed="PooledVision and TextTransformer with pool=cls, both of the decoder's width",
            remedy="one number for model.vision.width, model.text.width and model.decoder.width, as in model=coca_tiny",
        )
