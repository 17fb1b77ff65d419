"""A student's similarities follow those of a teacher (CLIP distillation as in TinyCLIP, arXiv 2309.12314).

Of every image the teacher says how likely each text of the global batch is to be its caption, and of every text how
likely each image; the student is trained on these instead of one right answer. The loss of a pair is the mean of two
cross-entropies of the student against the teacher. It is least where both agree, and is then the teacher's entropy,
not 0: the divergence, which is what the student can still learn, is told beside it.

A teacher that is sure says no more than the pairs do; a factor lower than that it was trained with spreads its answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError
from vlm_train.objectives.base import counted_rows
from vlm_train.objectives.contrastive import Contrastive, one_value
from vlm_train.objectives.pairing import full_precision
from vlm_train.types import Batch, LossOutput, Model

_FEATURES = ("image_features", "text_features")


class Distill(Contrastive):
    """Cross-entropy of the student's softmax over the global batch against a teacher's, both ways.

    Args:
        teacher: the folder of a finished run, whose model reads the same images and the same ids of text.
        teacher_scale: factor on the teacher's cosines.
        init_temperature: first value of the student's temperature; the factor on the cosine is its inverse.
        max_scale: the student's factor is clamped to [1, max_scale] after each step.
        learn_temperature: whether the student's temperature is trained.
    """

    def __init__(
        self,
        *,
        teacher: str,
        teacher_scale: float = 50.0,
        init_temperature: float = 0.07,
        max_scale: float = 100.0,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__(
            init_scale=1.0 / init_temperature,
            max_scale=max_scale,
            learn_temperature=learn_temperature,
            partners="pair",
            implementation="gathered",
        )
        if not teacher_scale > 0:
            raise ConfigError("the factor on the teacher's cosines is out of range", got=teacher_scale, allowed="> 0")
        self.teacher, self.teacher_scale = teacher, teacher_scale
        self._model: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no part of this run's state
        self.reset_parameters()

    def bind(self, model: nn.Module) -> None:
        """Hands over the teacher's model; before training, and not needed afterwards."""
        self._model = (model.requires_grad_(False).eval(),)

    def features(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """`image_features` and `text_features` [B, D] of the student, the same of the teacher, and `weights` [B]."""
        outputs = model(batch)
        (teacher,) = self._model
        teacher.to(self.logit_scale.device, self.logit_scale.dtype)  # nothing where it is there already
        with torch.no_grad():
            taught = teacher(batch)
        rows = {name: outputs[name] for name in _FEATURES} | {f"teacher_{name}": taught[name] for name in _FEATURES}
        return {**rows, "weights": counted_rows(batch).to(torch.float32)}

    def loss(self, features: dict[str, Tensor]) -> LossOutput:
        """Sum over this rank's pairs. Metrics: the divergence from the teacher, and the factor on the cosine."""
        pairing = self.pairing(features)
        keep, dtype = features["weights"] != 0, pairing.image_BD.dtype
        taught = [features[f"teacher_{name}"][keep].detach().to(dtype) for name in _FEATURES]
        with full_precision(pairing.image_BD):
            scale = self.logit_scale.exp()
            terms = [
                _cross_entropy(scale * mine @ _everywhere(others).T, self.teacher_scale * own @ _everywhere(theirs).T)
                for (mine, others), (own, theirs) in (
                    ((pairing.image_BD, pairing.text_CD), taught),
                    ((pairing.text_CD, pairing.image_BD), taught[::-1]),
                )
            ]
        total, entropy = (sum(parts) / 2 for parts in zip(*terms, strict=True))
        assert isinstance(total, Tensor) and isinstance(entropy, Tensor)
        count = pairing.num_pairs()
        return LossOutput(
            sum=total,
            count=count,
            metrics={"divergence": ((total - entropy).detach(), count), "distill_scale": one_value(scale)},
        )


def _everywhere(rows: Tensor) -> Tensor:
    return collectives.gather_rows(rows)


def _cross_entropy(logits_BN: Tensor, teacher_BN: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over rows of -sum q log p, of -sum q log q): cross-entropy against the teacher, and its own entropy."""
    log_q = teacher_BN.log_softmax(1)
    q = log_q.exp()
    return -(q * logits_BN.log_softmax(1)).sum(), -(q * log_q).sum()
