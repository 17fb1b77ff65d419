"""The evaluators of a run bound to its data; used between training steps and by `vlm-train evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vlm_train.engine.sharding import whole
from vlm_train.evaluation.base import Learner, TrainSplit
from vlm_train.types import Batch, Evaluator, Tokenizer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""precision -> dtype of the towers' matrix products; absent where there is no autocast."""


class EvaluationSuite:
    """Named evaluators over one loader.

    Args:
        evaluators: name -> evaluator.
        loader: yields this rank's validation batches; iterated once per evaluator.
        train: the training split, for evaluators that learn from it first.
        tokenizer: the run's, for what is drawn.
        interface: makes of a `model` on a `device` what evaluators ask, such as an `Embedder`.
    """

    def __init__(
        self,
        *,
        evaluators: Mapping[str, Evaluator],
        loader: Iterable[Batch],
        train: TrainSplit,
        tokenizer: Tokenizer,
        interface: Callable[..., Any],
    ) -> None:
        self.evaluators, self.loader, self.train = dict(evaluators), loader, train
        self.tokenizer, self.interface = tokenizer, interface
        self.errors: list[dict[str, Any]] = []  # samples of this rank that the last pass could not read
        self.moved: Callable[[], object] = lambda: None  # called at each batch: a long evaluation is at work

    @torch.no_grad()
    def run(self, model: nn.Module, device: torch.device) -> dict[str, dict[str, Any]]:
        """name -> result, the same on every rank. The model's training mode is left as it was found."""
        was_training = model.training
        model.eval()
        asked = self.interface(model=model, device=device)
        with whole(model):
            results = {name: dict(self._run(each, asked)) for name, each in self.evaluators.items()}
        model.train(was_training)
        return results

    def _run(self, evaluator: Evaluator, asked: Any) -> Mapping[str, Any]:
        if isinstance(evaluator, Learner):
            evaluator.fit(asked, self.train)
        return evaluator.run(asked, self._batches())

    def _batches(self) -> Iterator[Batch]:
        self.errors = []
        for batch in self.loader:
            self.moved()
            self.errors += batch["errors"]
            yield batch
