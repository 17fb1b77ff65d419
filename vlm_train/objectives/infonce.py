"""InfoNCE over the global batch (CLIP, arXiv 2103.00020), with hard captions (NegCLIP, arXiv 2210.01936) and partners
by content (UniCL, arXiv 2204.03610) where the config asks for them.

The loss of a pair is the mean of two cross-entropies: its image over all texts, its text over all images. A rank
returns the sum over its own pairs, so that the sums of all ranks add up to the global sum and each pair counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlm_train.objectives.contrastive import Contrastive, Implementation, Partners, one_value
from vlm_train.objectives.pairing import full_precision, softmax_gathered
from vlm_train.objectives.tiled import softmax_tiled
from vlm_train.types import LossOutput


class InfoNCE(Contrastive):
    """CLIP's objective: softmax over the global batch, both ways.

    Args:
        init_temperature: first value of the temperature; the factor on the cosine is its inverse.
        max_scale: the factor is clamped to [1, max_scale] after each step (100 in the paper); None leaves it free.
        learn_temperature: whether the temperature is trained.
        partners: see `Contrastive`.
        implementation: see `Contrastive`.
        pair: see `Contrastive`; ImageBind (arXiv 2305.05665) has one such loss for each pair that it sees.
    """

    def __init__(
        self,
        *,
        init_temperature: float = 0.07,
        max_scale: float | None = 100.0,
        learn_temperature: bool = True,
        partners: Partners = "pair",
        implementation: Implementation = "auto",
        pair: Sequence[str] = ("image", "text"),
    ) -> None:
        super().__init__(
            init_scale=1.0 / init_temperature,
            max_scale=max_scale,
            learn_temperature=learn_temperature,
            partners=partners,
            implementation=implementation,
            pair=pair,
        )
        self.reset_parameters()

    def loss(self, features: dict[str, Tensor]) -> LossOutput:
        """Sum over this rank's pairs. Metrics: in-batch accuracy both ways, and the factor on the cosine."""
        pairing = self.pairing(features)
        softmax = softmax_tiled if self.tiles(pairing) else softmax_gathered
        with full_precision(pairing.image_BD):
            scale = self.logit_scale.exp()
            total, image_hits, text_hits = softmax(pairing, scale)
        count, (first, second) = pairing.num_pairs(), self.pair
        return LossOutput(
            sum=total,
            count=count,
            metrics={
                f"accuracy_{first}_to_{second}": (image_hits, count),
                f"accuracy_{second}_to_{first}": (text_hits, count),
                "logit_scale": one_value(scale),
            },
        )
