"""Pairwise sigmoid loss over the global batch (SigLIP, arXiv 2303.15343).

Every image-text pair is a yes/no question: `-logsigmoid(z (scale * cosine + bias))`, z = +1 for partners, -1 otherwise,
summed over all pairs and divided by the number of *images* (not of pairs), which is why `count` counts images.

1. Each rank gathers every rank's texts, with gradient; images stay where they are.
2. A rank returns the sum over (its images) x (all texts). These blocks tile the global matrix exactly once.

Dividing by the local number of images, as public implementations do, is right only while ranks hold equal numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.objectives.base import top1_credit
from vlm_train.objectives.contrastive import Contrastive, full_precision, one_value, partner_columns, wide_empty
from vlm_train.types import LossOutput


def sigmoid(image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor) -> LossOutput:
    """Sum over this rank's images and all ranks' texts of the pairwise loss; count = local images. Collective.

    Args:
        image_BD: L2-normalised image features; row i belongs to row i of the texts. B may differ between ranks.
        text_BD: L2-normalised text features.
        scale: factor on the cosine, shape [1].
        bias: added to every logit, shape [1].
    """
    counts = collectives.row_counts(text_BD)
    text_ND = collectives.gather_rows(text_BD, counts)
    target_B = partner_columns(counts, image_BD.device)
    logits_BN = scale * image_BD @ text_ND.T + bias
    sign_BN = torch.full_like(logits_BN, -1.0, requires_grad=False).scatter_(1, target_B[:, None], 1.0)
    count = torch.tensor(len(target_B), device=image_BD.device)
    return LossOutput(
        sum=-F.logsigmoid(sign_BN * logits_BN).sum(),
        count=count,
        metrics={"accuracy_image_to_text": (top1_credit(logits_BN, target_B), count)},
    )


class Sigmoid(Contrastive):
    """SigLIP's objective.

    Args:
        init_scale: first value of the factor on the cosine.
        init_bias: first value of the bias; about -init_scale, so that training starts near "no" for every pair.
        max_scale: the factor is clamped to [1, max_scale] after each step; None (as SigLIP) leaves it free.
        learn_temperature: whether the factor is trained; the bias always is.
    """

    def __init__(
        self,
        *,
        init_scale: float = 10.0,
        init_bias: float = -10.0,
        max_scale: float | None = None,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__(init_scale=init_scale, max_scale=max_scale, learn_temperature=learn_temperature)
        self.init_bias = init_bias
        self.logit_bias = nn.Parameter(wide_empty())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the parameters to their first values (also after a build on the meta device)."""
        super().reset_parameters()
        self.logit_bias.fill_(self.init_bias)

    def loss(self, features: dict[str, Tensor]) -> LossOutput:
        """Sum over this rank's images and all texts. Metrics: in-batch accuracy, factor on the cosine, bias."""
        image_BD, text_BD = self.pairs(features)
        with full_precision(image_BD):
            scale = self.logit_scale.exp()
            output = sigmoid(image_BD, text_BD, scale, self.logit_bias)
        output.metrics["logit_scale"] = one_value(scale)
        output.metrics["logit_bias"] = one_value(self.logit_bias)
        return output
