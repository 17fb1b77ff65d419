"""How evaluators see a model that answers: questions about pictures to texts.

Sharded models communicate inside forward, so every rank must call the model equally often even when ranks hold unequal
numbers of questions: `Answerer.answers` agrees on the number of forwards first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError
from vlm_train.evaluation.base import Embedder, inference
from vlm_train.types import Batch, Tokenizer

_QUESTIONS_PER_FORWARD = 64


class Prompts(Protocol):
    """How a question becomes what a model goes on from; `data.dialogue.DialogueEncoder` is the one implementation."""

    stop_id: int

    def question(self, text: str) -> list[int]:
        """ids of a dialogue that ends where the assistant is to begin; IMAGE_ID where its picture is read."""


class Answerer:
    """Answers with a model, in evaluation mode and without graph; the model's mode is restored after each call.

    Args:
        model: has `generate`, as `GenerativeModel`; the module itself, not a data-parallel wrapper of it.
        dialogues: how questions are written for it.
        tokenizer: the one the model was trained with.
        device: where the model lies.
        autocast: dtype of the forward (`torch.bfloat16`), or None for the model's own.
        max_new_tokens: an answer that has not ended by then is cut off.
    """

    def __init__(
        self,
        *,
        model: Any,
        dialogues: Prompts,
        tokenizer: Tokenizer,
        device: torch.device,
        autocast: torch.dtype | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        self.model, self.dialogues, self.tokenizer, self.device = model, dialogues, tokenizer, device
        self.autocast, self.max_new_tokens = autocast, max_new_tokens

    def answers(self, batch: Batch, questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """An answer to each of a row's questions, for every row of the batch. Greedy. Collective.

        Raises:
            ConfigError: as many lists of questions as rows are asked for.
            SampleError: a question that is longer than the context.
        """
        pictures = batch["images"]
        if len(questions) != len(pictures):
            raise ConfigError("questions do not fit their pictures", got=f"{len(questions)} lists",
                              allowed=f"{len(pictures)}, one for each row")  # fmt: skip
        asked = [(row, text) for row, texts in enumerate(questions) for text in texts]
        mine = torch.tensor(-(-len(asked) // _QUESTIONS_PER_FORWARD), device=self.device)
        num_forwards = int(collectives.all_reduce_max(mine))
        told: list[str] = []
        for index in range(num_forwards):
            chunk = asked[index * _QUESTIONS_PER_FORWARD :][:_QUESTIONS_PER_FORWARD]
            # a rank without questions still takes part in the forward
            told += self._told(pictures, chunk or [(0, "")])[: len(chunk)]
        answers = iter(told)
        return [[next(answers) for _ in texts] for texts in questions]

    def _told(self, pictures: Tensor, asked: Sequence[tuple[int, str]]) -> list[str]:
        prompts = [self.dialogues.question(text) for _, text in asked]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        with inference(self.model, self.device, self.autocast):
            found = self.model.generate(
                pictures[[row for row, _ in asked]].to(self.device, non_blocking=True),
                torch.ones(len(asked), dtype=torch.int64, device=self.device),
                ids.to(self.device),
                lengths.to(self.device),
                max_new_tokens=self.max_new_tokens,
                eos_id=self.dialogues.stop_id,
            )
        return [self.tokenizer.decode(self._ended(row)) for row in found.tolist()]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.dialogues.stop_id)] if self.dialogues.stop_id in ids else ids


def check_asked(evaluators: Mapping[str, Any], given: Any, model: str) -> None:
    """Refuses evaluators that ask what a model cannot tell, before it trains. `given`: `Embedder` or `Answerer`.

    Raises:
        ConfigError: naming the first of them.
    """
    for name, evaluator in evaluators.items():
        wanted = getattr(evaluator, "asks", Embedder)
        if wanted is not given:
            raise ConfigError(
                f"the evaluator {name} asks what {model} cannot tell", got=f"it asks an {wanted.__name__}",
                allowed=f"evaluators that ask an {given.__name__}",
                remedy=f"evaluation={'vqa' if given is Answerer else 'retrieval'}",
            )  # fmt: skip
