"""InfoNCE over the global batch (CLIP, arXiv 2103.00020).

1. Each rank gathers every rank's images and texts, with gradient.
2. Local images are scored against all texts, and local texts against all images: [b, N] logits, never [N, N].
3. The loss of a pair is the mean of the two cross-entropies; a rank returns the sum over its own pairs.

The sums of all ranks add up to the global sum and each pair is computed once. The gradient is exact because the gather
carries it back: a local image also receives what other ranks' texts ask of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.objectives.base import top1_credit
from vlm_train.objectives.contrastive import Contrastive, full_precision, one_value, partner_columns
from vlm_train.types import LossOutput


def infonce(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> LossOutput:
    """Sum over this rank's pairs of the two-way cross-entropy against the pairs of all ranks. Collective.

    Args:
        image_BD: L2-normalised image features; row i belongs to row i of the texts. B may differ between ranks.
        text_BD: L2-normalised text features.
        scale: factor on the cosine, shape [1].
    """
    counts = collectives.row_counts(image_BD)
    # side by side, so that both travel in one exchange each way
    image_ND, text_ND = collectives.gather_rows(torch.cat([image_BD, text_BD], dim=1), counts).chunk(2, dim=1)
    target_B = partner_columns(counts, image_BD.device)
    image_logits_BN = scale * image_BD @ text_ND.T
    text_logits_BN = scale * text_BD @ image_ND.T
    image_sum = F.cross_entropy(image_logits_BN, target_B, reduction="sum")
    text_sum = F.cross_entropy(text_logits_BN, target_B, reduction="sum")
    count = torch.tensor(len(target_B), device=image_BD.device)
    return LossOutput(
        sum=0.5 * (image_sum + text_sum),
        count=count,
        metrics={
            "accuracy_image_to_text": (top1_credit(image_logits_BN, target_B), count),
            "accuracy_text_to_image": (top1_credit(text_logits_BN, target_B), count),
        },
    )


class InfoNCE(Contrastive):
    """CLIP's objective: softmax over the global batch, both ways.

    Args:
        init_temperature: first value of the temperature; the factor on the cosine is its inverse.
        max_scale: the factor is clamped to [1, max_scale] after each step.
        learn_temperature: whether the temperature is trained.
    """

    def __init__(
        self, *, init_temperature: float = 0.07, max_scale: float = 100.0, learn_temperature: bool = True
    ) -> None:
        super().__init__(init_scale=1.0 / init_temperature, max_scale=max_scale, learn_temperature=learn_temperature)
        self.reset_parameters()

    def loss(self, features: dict[str, Tensor]) -> LossOutput:
        """Sum over this rank's pairs. Metrics: in-batch accuracy both ways, and the factor on the cosine."""
        image_BD, text_BD = self.pairs(features)
        with full_precision(image_BD):
            scale = self.logit_scale.exp()
            output = infonce(image_BD, text_BD, scale)
        output.metrics["logit_scale"] = one_value(scale)
        return output
