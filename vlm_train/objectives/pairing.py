"""Who belongs to whom in a global batch, and the plain losses over it: every feature gathered, logits of [b, N].

An image and a text are *partners* when they agree in one of their ids. With the position in the global batch as the
only id that is CLIP's rule, each image has one text; with ids of contents, two pairs that share an image or a caption
are no negatives of each other (UniCL, arXiv 2204.03610). Texts may outnumber images: a hard caption has no partner.

These functions are the reference that `tiled.py` is held against; other ranks' features come in one exchange, where
tiles take one for each rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives

NOBODY = -1
"""An id that agrees with none, not even with itself."""

COPIES = 3
"""How often a gathered loss holds its logits at its peak; measured 3.1 (softmax) and 2.4 (sigmoid)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Images and texts of this rank that meet those of all ranks.

    Args:
        image_BD: unit vectors; B may differ between ranks and may be 0.
        text_CD: unit vectors. The first B are the images' captions, which are asked for their image; what stands
            behind them, hard captions, is only a wrong answer.
        image_ids: int64 [B, I]. `NOBODY` agrees with nothing.
        text_ids: int64 [C, I].
        image_counts, text_counts: B and C of every rank.
    """

    image_BD: Tensor
    text_CD: Tensor
    image_ids: Tensor
    text_ids: Tensor
    image_counts: list[int]
    text_counts: list[int]

    def num_pairs(self) -> Tensor:
        """Pairs of this rank, int64 scalar."""
        return torch.tensor(len(self.image_BD), device=self.image_BD.device)


def partner_mask(image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """bool [R, C] for ids [R, I] and [C, I]."""
    mask = torch.zeros(len(image_ids), len(text_ids), dtype=torch.bool, device=image_ids.device)
    for image, text in zip(image_ids.unbind(1), text_ids.unbind(1), strict=True):
        mask |= (image[:, None] == text) & (image[:, None] != NOBODY)
    return mask


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def softmax_gathered(pairing: Pairing, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of this rank's terms, hits of its images, hits of its texts). Collective.

    The terms of a pair are half the cross-entropy of the image over all texts and half that of the text over all
    images, against a target spread evenly over partners. A hit is a row whose largest logit is a partner's; k equal
    largest ones share it.
    """
    texts, text_ids = _everywhere(pairing.text_CD, pairing.text_ids, pairing.text_counts)
    images, image_ids = _everywhere(pairing.image_BD, pairing.image_ids, pairing.image_counts)
    image_terms, image_hits = _cross_entropy(
        scale * pairing.image_BD @ texts.T, partner_mask(pairing.image_ids, text_ids)
    )
    num_pairs = len(pairing.image_BD)
    asking, asking_ids = pairing.text_CD[:num_pairs], pairing.text_ids[:num_pairs]
    text_terms, text_hits = _cross_entropy(scale * asking @ images.T, partner_mask(image_ids, asking_ids).T)
    return (image_terms + text_terms) / 2, image_hits, text_hits


def sigmoid_gathered(pairing: Pairing, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the pairwise terms of this rank's images and all texts, hits of its images). Collective."""
    texts, text_ids = _everywhere(pairing.text_CD, pairing.text_ids, pairing.text_counts)
    logits = scale * pairing.image_BD @ texts.T + bias
    mask = partner_mask(pairing.image_ids, text_ids)
    terms = F.softplus(logits) - torch.where(mask, logits, 0)  # -logsigmoid of l for partners, of -l for the others
    return terms.sum(), _hits(logits, mask)


def gathered_bytes(pairing: Pairing) -> float:
    """What the gathered losses take at their peak, on the rank that takes most; equal on every rank."""
    images, texts = sum(pairing.image_counts), sum(pairing.text_counts)
    logits = max(
        num_images * texts + num_texts * images
        for num_images, num_texts in zip(pairing.image_counts, pairing.text_counts, strict=True)
    )
    return COPIES * logits * pairing.image_BD.element_size()


def _everywhere(rows: Tensor, ids: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    return collectives.gather_rows(rows, counts), collectives.gather_rows(ids, counts)


def _cross_entropy(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    partners = mask.sum(1).clamp(min=1)
    terms = torch.where(mask, -logits.log_softmax(1), 0).sum(1) / partners
    return terms.sum(), _hits(logits, mask)


@torch.no_grad()
def _hits(logits: Tensor, mask: Tensor) -> Tensor:
    if not logits.numel():
        return logits.new_zeros(())
    at_top = logits == logits.amax(1, keepdim=True)
    return ((at_top & mask).sum(1) / at_top.sum(1).to(logits.dtype)).sum()
