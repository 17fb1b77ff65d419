"""How evaluators see a model that answers: questions about pictures to texts.

A question is asked about all images of its sample, about none where there is none. One that cannot be asked, since it
and its images do not fit, is no error: what it was refused for stands in the place of its answer.

Sharded models communicate inside forward, so every rank must call the model equally often even when ranks hold unequal
numbers of questions: `Answerer` agrees on the number of forwards first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.base import Embedder, inference
from vlm_train.types import Batch, Grid, Tokenizer, grids_of

MAX_NEW_TOKENS = 32
"""An answer to a question that has not ended by then is cut off."""

_QUESTIONS_PER_FORWARD = 64

Reply = str | DataError
"""An answer, or why the question could not be asked."""

Pictures = Sequence[Grid]
"""The tiles of each picture that a question is about."""

Shown = tuple[Tensor, Tensor, Sequence[Pictures]]
"""What N questions are about: images uint8 [N, I, 3, S, S], how many of them count, int64 [N], and their pictures."""


class Prompts(Protocol):
    """How a question becomes what a model goes on from; `data.dialogue.DialogueEncoder` is the one implementation."""

    stop_id: int

    @property
    def reads_questions(self) -> bool:
        """Whether a prompt says what is asked, or is the images alone."""

    def question(self, text: str, grids: Pictures) -> list[int]:
        """ids of a dialogue that ends where the assistant is to begin; IMAGE_ID where its pictures are read. Raises
        DataError where the context does not hold it, or the model takes fewer pictures."""

    def opening(self, metadata: Mapping[str, Any], caption: str) -> tuple[str, str]:
        """What is asked first in the dialogue of a sample, and what is said to it."""


class Answerer:
    """Answers with a model, in evaluation mode and without graph; the model's mode is restored after each call. Greedy.

    Args:
        model: has `generate`, as `GenerativeModel`; the module itself, not a data-parallel wrapper of it.
        dialogues: how questions are written for it.
        tokenizer: the one the model was trained with.
        device: where the model lies.
        open_picture: a file to what the model sees of it, uint8 [N, 3, S, S], and its tiles; raises DataError.
        autocast: dtype of the forward (`torch.bfloat16`), or None for the model's own.
    """

    def __init__(
        self,
        *,
        model: Any,
        dialogues: Prompts,
        tokenizer: Tokenizer,
        device: torch.device,
        open_picture: Callable[[Path], tuple[Tensor, Grid]],
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.dialogues, self.tokenizer, self.device = model, dialogues, tokenizer, device
        self.open_picture, self.autocast = open_picture, autocast

    def answers(
        self, batch: Batch, questions: Sequence[Sequence[str]], *, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> list[list[Reply]]:
        """A reply to each of a row's questions, about the images of that row, for every row of the batch. Collective.

        Args:
            batch: `images`, `num_images` and, with tiles, `grids` are read.
            questions: a list for each row.
            max_new_tokens: an answer that has not ended by then is cut off.

        Raises:
            ConfigError: as many lists of questions as rows are asked for.
        """
        images, num_images, grids = batch["images"], batch["num_images"].cpu(), grids_of(batch)
        if len(questions) != len(images):
            raise ConfigError("questions do not fit their pictures", got=f"{len(questions)} lists",
                              allowed=f"{len(images)}, one for each row")  # fmt: skip
        asked = [(text, row) for row, texts in enumerate(questions) for text in texts]
        prompts = [self._prompt_or_error(text, grids[row], max_new_tokens) for text, row in asked]

        def shown(chosen: Sequence[int]) -> Shown:
            rows = [asked[place][1] for place in chosen]
            return images[rows], num_images[rows], [grids[row] for row in rows]

        replies = iter(self._replies(prompts, shown, max_new_tokens))
        return [[next(replies) for _ in texts] for texts in questions]

    def blind_answers(self, questions: Sequence[tuple[str, Pictures]]) -> list[Reply]:
        """A reply to each question, about pictures with these tiles in one colour, the mean of those that the model's
        tower is made for. Collective; ranks may ask unequally many."""
        prompts = [self._prompt_or_error(text, grids, MAX_NEW_TOKENS) for text, grids in questions]

        def shown(chosen: Sequence[int]) -> Shown:
            return self._blank([questions[place][1] for place in chosen])

        return self._replies(prompts, shown, MAX_NEW_TOKENS)

    def prompt(self, text: str, grids: Pictures, max_new_tokens: int) -> list[int]:
        """ids of a question about pictures with these tiles.

        Raises:
            DataError: they leave no room for an answer, or the model takes fewer pictures.
        """
        ids = self.dialogues.question(text, grids)
        if len(ids) + max_new_tokens > self.model.text.context:
            raise DataError(
                "an answer does not fit behind its prompt",
                got=f"{len(ids)} tokens and {max_new_tokens} new ones",
                allowed=f"{self.model.text.context} together",
                remedy="fewer new tokens, or a shorter question",
            )
        return ids

    def _prompt_or_error(self, text: str, grids: Pictures, max_new_tokens: int) -> list[int] | DataError:
        try:
            return self.prompt(text, grids, max_new_tokens)
        except DataError as error:
            return error

    def _replies(
        self,
        prompts: Sequence[list[int] | DataError],
        shown: Callable[[Sequence[int]], Shown],
        max_new_tokens: int,
    ) -> list[Reply]:
        """The texts behind prompts. `shown`: places among the prompts -> what they are about."""
        replies: list[Reply] = [prompt if isinstance(prompt, DataError) else "" for prompt in prompts]
        places = [place for place, prompt in enumerate(prompts) if not isinstance(prompt, DataError)]
        mine = torch.tensor(-(-len(places) // _QUESTIONS_PER_FORWARD), device=self.device)
        for index in range(int(collectives.all_reduce_max(mine))):
            chosen = places[index * _QUESTIONS_PER_FORWARD :][:_QUESTIONS_PER_FORWARD]
            if not chosen:  # a rank without questions still takes part in the forward
                self._told([[self.dialogues.stop_id]], self._blank([()]), max_new_tokens)
                continue
            ids: list[Any] = [prompts[place] for place in chosen]
            for place, text in zip(chosen, self._told(ids, shown(chosen), max_new_tokens), strict=True):
                replies[place] = text
        return replies

    def _blank(self, pictures: Sequence[Pictures]) -> Shown:
        """Images of the mean colour."""
        spec = self.model.image_spec
        num_images = [sum(grid.num_images for grid in grids) for grids in pictures]
        colour = (255 * torch.tensor(spec.mean)).round().to(torch.uint8)
        shape = (len(num_images), max(1, *num_images), 3, spec.size, spec.size)
        return colour[:, None, None].expand(shape), torch.tensor(num_images), pictures

    def _told(self, prompts: Sequence[list[int]], shown: Shown, max_new_tokens: int) -> list[str]:
        images, num_images, pictures = shown
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        with inference(self.model, self.device, self.autocast):
            found = self.model.generate(
                images.to(self.device, non_blocking=True),
                num_images.to(self.device, non_blocking=True),
                ids.to(self.device),
                lengths.to(self.device),
                max_new_tokens=max_new_tokens,
                eos_id=self.dialogues.stop_id,
                pictures=pictures,
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
