"""Pairwise sigmoid loss over the global batch (SigLIP, arXiv 2303.15343).

Every image-text pair is a yes/no question: `-logsigmoid(z (scale * cosine + bias))`, z = +1 for partners, -1 otherwise,
summed over all pairs and divided by the number of *images* (not of pairs), which is why `count` counts images. A rank
returns the sum over (its images) x (all texts); these blocks tile the global matrix exactly once.

Dividing by the local number of images, as public implementations do, is right only while ranks hold equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_train.objectives.contrastive import (
    Contrastive,
    Implementation,
    Partners,
    one_value,
    wide_empty,
)
from vlm_train.objectives.pairing import full_precision, sigmoid_gathered
from vlm_train.objectives.tiled import sigmoid_tiled
from vlm_train.types import LossOutput


class Sigmoid(Contrastive):
    """SigLIP's objective.

    Args:
        init_scale: first value of the factor on the cosine.
        init_bias: first value of the bias; about -init_scale, so that training starts near "no" for every pair.
        max_scale: the factor is clamped to [1, max_scale] after each step; None (as SigLIP) leaves it free.
        learn_temperature: whether the factor is trained; the bias always is.
        partners: see `Contrastive`.
        implementation: see `Contrastive`.
        pair: see `Contrastive`.
    """

    def __init__(
        self,
        *,
        init_scale: float = 10.0,
        init_bias: float = -10.0,
        max_scale: float | None = None,
        learn_temperature: bool = True,
        partners: Partners = "pair",
        implementation: Implementation = "auto",
        pair: Sequence[str] = ("image", "text"),
    ) -> None:
        super().__init__(
            init_scale=init_scale,
            max_scale=max_scale,
            learn_temperature=learn_temperature,
            partners=partners,
            implementation=implementation,
            pair=pair,
        )
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
        pairing = self.pairing(features)
        sigmoid = sigmoid_tiled if self.tiles(pairing) else sigmoid_gathered
        with full_precision(pairing.image_BD):
            scale = self.logit_scale.exp()
            total, image_hits = sigmoid(pairing, scale, self.logit_bias)
        count, (first, second) = pairing.num_pairs(), self.pair
        return LossOutput(
            sum=total,
            count=count,
            metrics={
                f"accuracy_{first}_to_{second}": (image_hits, count),
                "logit_scale": one_value(scale),
                "logit_bias": one_value(self.logit_bias),
            },
        )
