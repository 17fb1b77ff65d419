"""Next-token prediction over dialogues: what an assistant says, token by token, under what it sees and was asked.

What is counted are labels of the whole global batch: a sum over all of them divided by their number, so a long answer
weighs more than a short one, and the result does not depend on which rank, micro-batch or row a dialogue lies in. The
mean of the means of micro-batches, which most trainers minimised until 2024, does.
"""

from __future__ import annotations

from torch import Tensor

from vlm_train.objectives.base import SeparableObjective, counted_rows
from vlm_train.objectives.token_nll import token_nll
from vlm_train.types import NO_LABEL, Batch, LossOutput, Model


class NextToken(SeparableObjective):
    """Negative log-likelihood of each label of a dialogue. Logits exist for labels alone, some rows at a time."""

    requires = frozenset({"token_hidden", "token_vocabulary"})
    reads = frozenset({"dialogue_labels"})

    def __init__(self) -> None:  # no option: the keys of a config are read from here
        super().__init__()

    def count(self, batch: Batch) -> Tensor:
        """Number of labels."""
        return _is_label(batch).sum()

    def forward(self, model: Model, batch: Batch) -> LossOutput:
        """Sum over the labels of one micro-batch. Metrics: `accuracy`, how often the label is the likeliest token, and
        `labels_per_sample`."""
        outputs = model(batch)
        is_label = _is_label(batch)
        hidden_ND, labels_N = outputs["token_hidden"][is_label], batch["dialogue_labels"][is_label]
        total, hits = token_nll(hidden_ND, outputs["token_vocabulary"], labels_N)
        count = is_label.sum()
        samples = counted_rows(batch).sum()
        return LossOutput(
            sum=total, count=count, metrics={"accuracy": (hits, count), "labels_per_sample": (count, samples)}
        )


def _is_label(batch: Batch) -> Tensor:
    """Which positions tell the token behind them: bool [B, T]."""
    return (batch["dialogue_labels"] != NO_LABEL) & counted_rows(batch)[:, None]
