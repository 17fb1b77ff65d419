"""Captioning: how likely a text is under its image, token by token (as in CoCa, arXiv 2205.01917, equation 3).

The label of a token is the next one. The first has no label, padding is none; that a text has ended is one. What is
counted are labels, so a long caption weighs more than a short one, whichever ranks and micro-batches they lie in.
"""

from __future__ import annotations

from torch import Tensor

from vlm_train.objectives.base import SeparableObjective, counted_rows
from vlm_train.objectives.token_nll import token_nll
from vlm_train.types import Batch, LossOutput, Model


class Captioning(SeparableObjective):
    """Negative log-likelihood of each token of a caption, from its image and the tokens before it."""

    requires = frozenset({"caption_hidden", "caption_vocabulary"})

    def __init__(self) -> None:  # no option: the keys of a config are read from here
        super().__init__()

    def count(self, batch: Batch) -> Tensor:
        """Number of labels."""
        return _is_label(batch).sum()

    def forward(self, model: Model, batch: Batch) -> LossOutput:
        """Sum over the labels of one micro-batch. Metrics: `accuracy`, how often the label is the likeliest token."""
        outputs = model(batch)
        is_label = _is_label(batch)
        hidden_ND, labels_N = outputs["caption_hidden"][:, :-1][is_label], batch["text_ids"][:, 1:][is_label]
        total, hits = token_nll(hidden_ND, outputs["caption_vocabulary"], labels_N)
        count = is_label.sum()
        return LossOutput(sum=total, count=count, metrics={"accuracy": (hits, count)})


def _is_label(batch: Batch) -> Tensor:
    """Which tokens behind the first are to be told: bool [B, T - 1]."""
    return batch["text_mask"][:, 1:] & counted_rows(batch)[:, None]
