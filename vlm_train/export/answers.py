"""How far another library is from a generative model of ours: both read the same dialogues about the same pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_train.export.certificate import (
    TOLERANCE,
    Certificate,
    Prepare,
    Seeing,
    distance,
    pixel_distance,
    require_same,
    smooth_picture,
)
from vlm_train.models.generative import GenerativeModel
from vlm_train.types import IMAGE_ID, Batch, DialogueSpec, TextSpec, Tokenizer

QUESTIONS = ["<image>\nWhat is in the picture?", "Two dogs, one ball: how many are they?", "<image>\n", "?",
             "<image>\nIs there a red square above the blue circle? Answer with yes or no."]  # fmt: skip
"""What the certificate asks, with a picture and without; what does not fit a context is left out."""


class Speaking(Seeing, Protocol):
    """A generative model in the hands of another library. `image_id`: the token that stands for a token of an image."""

    image_id: int

    def logits(self, pixels_N3SS: Tensor, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Of dialogues with the ids of ours, and the normalised pixels of their images in order: [B, T, V]."""

    def prompt(self, text: str, picture: Image.Image) -> list[int] | None:
        """The ids of a question up to where the answer begins, IMAGE_ID where `picture` is read if it has `<image>`;
        None where it came without tokenizer or without a way to write questions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """A generative model and what belongs to it.

    Attributes:
        tokenizer: None where there is none, and then none of the following.
        prompt: the ids of a question up to where the answer begins; None for one that does not fit.
        stop_id: the token at which an answer ends.
        chat_template: how its dialogues are written, for transformers.
    """

    model: GenerativeModel
    tokenizer: Tokenizer | None
    prompt: Callable[[str], list[int] | None] | None = None
    stop_id: int | None = None
    chat_template: str | None = None

    @property
    def objective(self) -> dict[str, Tensor]:
        """As of `Trained`; there is nothing."""
        return {}

    def reference(self) -> Answering:
        """A copy on the CPU in fp32, in evaluation mode."""
        return replace(self, model=copy.deepcopy(self.model).to("cpu", torch.float32).eval())

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V]."""
        outputs = self.model(batch)
        return outputs["token_hidden"] @ outputs["token_vocabulary"].T

    def questions(self) -> list[tuple[str, list[int]]]:
        """What of `QUESTIONS` fits the model, and its ids."""
        if self.prompt is None:
            return []
        return [(text, ids) for text in QUESTIONS if (ids := self.prompt(text)) is not None]


@torch.no_grad()
def certify_answers(trained: Answering, library: Speaking, *, prepare: Prepare | None = None) -> Certificate:
    """Compares `trained`, a `reference()`, with the same model in another library: logits at every token of some
    dialogues, and where it can the ids of questions and the pixels of a picture.

    Raises:
        CheckpointError: they differ.
    """
    model, asked = trained.model, trained.questions()
    pictures = _pictures(model.image_spec.size)
    theirs = [library.prompt(text, picture) for (text, _), picture in zip(asked, pictures * len(asked), strict=False)]
    dialogues = [ids for _, ids in asked] or _random_dialogues(model.dialogue, model.text_spec, library.image_id)
    batch = _batch(dialogues, model, pictures, prepare)
    lengths = batch["dialogue_lengths"]
    there = torch.arange(batch["images"].shape[1]) < batch["num_images"][:, None]
    ours = trained.logits(batch)
    other = library.logits(model.normalize(batch["images"][there]), batch["dialogue_ids"], lengths)
    is_token = torch.arange(ours.shape[1]) < lengths[:, None]
    has_tokens = bool(asked) and None not in theirs
    found = Certificate(
        library=library.name,
        features=None,
        logits=distance(ours[is_token], other[is_token][:, : ours.shape[-1]]),
        pixels=pixel_distance(model, library, prepare),
        has_tokens=has_tokens,
    )
    require_same(
        found,
        logit_tolerance=TOLERANCE * max(1.0, ours[is_token].abs().max().item()),
        are_same_tokens=not has_tokens or theirs == [ids for _, ids in asked],
    )
    return found


def _pictures(size: int) -> list[Image.Image]:
    """Waves and noise, wide and high."""
    noise = np.random.default_rng(0).integers(0, 256, (2 * size, size * 3 // 2, 3), dtype=np.uint8)
    return [smooth_picture(2 * size, size), Image.fromarray(noise), smooth_picture(size, size + 7)]


def _batch(
    dialogues: Sequence[Sequence[int]], model: GenerativeModel, pictures: Sequence[Image.Image], prepare: Prepare | None
) -> Batch:
    """The dialogues with a picture in each place for one; without `prepare` pictures of noise."""
    lengths = torch.tensor([len(ids) for ids in dialogues])
    ids_BT = torch.zeros(len(dialogues), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(dialogues):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    num_images = (ids_BT == IMAGE_ID).sum(dim=1) // model.tokens_per_image
    size, most = model.image_spec.size, int(num_images.max())
    shape = (len(dialogues), most, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if prepare is not None:
        seen = torch.stack([torch.from_numpy(prepare(picture)) for picture in pictures])
        places = torch.arange(len(dialogues) * most) % len(pictures)
        images = seen[places].view(shape)
    return Batch(images=images, num_images=num_images, dialogue_ids=ids_BT, dialogue_lengths=lengths)


def _random_dialogues(dialogue: DialogueSpec, text: TextSpec, image_id: int) -> list[list[int]]:
    """Dialogues of uneven lengths without that token, every second one with an image behind its first word."""
    generator = torch.Generator().manual_seed(1)
    room = dialogue.context_length - dialogue.num_image_tokens
    found = []
    for row, share in enumerate((1.0, 0.5, 0.3, 0.8)):
        num_words = max(1, min(24, int(room * share)))
        drawn = torch.randint(text.vocab_size - 1, (num_words,), generator=generator)
        words = (drawn + (drawn >= image_id)).tolist()
        image = [IMAGE_ID] * (dialogue.num_image_tokens if row % 2 == 0 else 0)
        found.append([*words[:1], *image, *words[1:]])
    return found
