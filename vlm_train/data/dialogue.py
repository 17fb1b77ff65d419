"""Dialogues to the ids that a generative model reads, and to the labels that it is told.

A dialogue is tokenized once, whole; which tokens are learned comes from the characters that each covers. Counting the
tokens of parts that were tokenized alone, as LLaVA does, goes wrong wherever a tokenizer joins characters across a
border. Labels are shifted already: `labels[t]` is the token to be told behind position t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_train.data.chat import (
    IMAGE,
    TEMPLATES,
    ChatTemplate,
    Image,
    Segment,
    Template,
    Token,
    Turn,
    num_images,
    render,
)
from vlm_train.data.chat import turns_of as turns_of
from vlm_train.data.chat_own import OwnTemplate
from vlm_train.data.decode import SampleError, first_image, image_parts, open_image
from vlm_train.data.pieces import END_MARK, IMAGE_MARK, Pieces, inner_of, unmarked
from vlm_train.data.tiles import grid_of, picture_ids
from vlm_train.errors import ConfigError, nearest
from vlm_train.types import IMAGE_ID, NO_LABEL, WHOLE, Batch, DialogueSpec, Grid, Tokenizer

OWN, PLAIN = "own", "plain"


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A dialogue of T tokens. `ids` and `labels`: int64 [T], as in `types.Batch`. `grids`: the tiles of its pictures.
    `num_cut`: further tokens that the context did not hold."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    grids: tuple[Grid, ...]
    num_cut: int = 0

    @property
    def num_images(self) -> int:
        """Images that the model reads, each tile and overview one."""
        return sum(grid.num_images for grid in self.grids)


class DialogueEncoder:
    """Turns to ids and labels. What stands for an image in a dialogue is a picture here, of one image or of tiles.

    A token is learned where it covers a character of what the assistant says, or ends its turn. Where the tokenizer
    lacks a special token of the template, its end token ends a turn and other tokens are spelt out; where it sees no
    newline (ours joins spaces), its end token also stands for the one that ends a plain caption. The token that begins
    a text comes first if the tokenizer puts one there, unless a tokenizer's own template decides on that.

    `template`: its name. `stop_id`: the token at which an answer ends.

    Args:
        template: plain, vicuna, llama3, chatml, mistral; or own, the chat template that the tokenizer brings.
        tokenizer: one of `data.tokenizer`.
        spec: what the model takes.
        system: what the system says in dialogues without it; None leaves that to the template, "" is nothing.

    Raises:
        ConfigError: an unknown template, or one that the tokenizer cannot write.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, spec: DialogueSpec, system: str | None = None) -> None:
        self.template, self.spec, self.system = template, spec, system
        names = [*TEMPLATES, OWN]
        if template not in names:
            near = " or ".join(nearest(template, names)) or "chatml"
            remedy = f"did you mean {near}?"
            raise ConfigError("unknown template of dialogues", got=template, allowed=", ".join(names), remedy=remedy)
        chosen = OwnTemplate(inner_of(tokenizer)) if template == OWN else TEMPLATES[template]
        self._pieces = Pieces(tokenizer, chosen.tokens if chosen.stop_is_text else [chosen.stop, *chosen.tokens])
        if isinstance(chosen, ChatTemplate) and self._pieces(f"a{chosen.stop}") == self._pieces("a"):
            chosen = replace(chosen, stop_is_text=False)
        self._template: Template = chosen
        stop = chosen.stop if chosen.stop_is_text else self._mark(Token(chosen.stop, is_learned=True))
        self.stop_id = self._pieces(stop)[0][-1]
        self._row_mark = self._pieces(f"{IMAGE_MARK}\n{IMAGE_MARK}")[0][1:-1]
        begins = tokenizer.spec.bos_id is not None and template != OWN
        self._begin = [tokenizer.spec.bos_id] if begins else []

    def read(self, parts: Mapping[str, bytes], metadata: Mapping[str, Any], caption: str) -> Encoded:
        """The dialogue of a sample of `parts`, to learn; with the template plain its image and `caption`. Nothing is
        decoded.

        Raises:
            SampleError: as `turns_of` and `encode`; no_image when it speaks of images and the sample has none;
                dialogue_image_count when the sample has another number of them; with tiles also as `open_image`, since
                how many there are hangs on the size of a picture.
        """
        turns = turns_of({} if self.template == PLAIN else metadata, caption)
        if num_images(turns):
            first_image(parts)
        names = image_parts(parts)
        encoded = self.encode(turns, [self.grid(parts[name]) for name in names])
        check_images(encoded, len(names))
        return encoded

    def grid(self, image: bytes) -> Grid:
        """The tiles of a picture; its header is read where there may be any. Raises SampleError as `open_image`."""
        if self.spec.max_tiles == 1:
            return WHOLE
        opened = open_image(image)
        return grid_of(opened.width, opened.height, self.spec)

    def encode(self, turns: Sequence[Turn], grids: Sequence[Grid] = ()) -> Encoded:
        """A dialogue to learn. `grids`: the tiles of its pictures in order; those beyond are one image each.

        One that is longer than the context is cut behind the last token that is learned, or read of an image, in it.

        Raises:
            SampleError: dialogue_no_label when the assistant says nothing, or nothing that fits; dialogue_image_cut
                when an image does not fit; dialogue_many_images; dialogue_roles.
        """
        if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
            raise SampleError("dialogue_no_label", got="no answer with text")
        grids = (*grids, *[WHOLE] * num_images(turns))[: num_images(turns)]
        ids, is_learned = self._tokens(turns, grids, answers=True)
        length, num_tokens = self.spec.context_length, len(ids)
        if num_tokens > length:
            if (ids[length:] == IMAGE_ID).any():
                raise SampleError(
                    "dialogue_image_cut", got=f"{num_tokens} tokens", allowed=f"images in the first {length}"
                )
            needed = np.flatnonzero(is_learned[:length] | (ids[:length] == IMAGE_ID))
            length = int(needed[-1]) + 1 if len(needed) else 0
            ids, is_learned = ids[:length], is_learned[:length]
        labels = np.full(len(ids), NO_LABEL, dtype=np.int64)
        labels[:-1] = np.where(is_learned[1:], ids[1:], NO_LABEL)
        if (labels == NO_LABEL).all():
            raise SampleError("dialogue_no_label", got=f"no answer in the first {self.spec.context_length} tokens")
        return Encoded(ids=ids, labels=labels, grids=grids, num_cut=num_tokens - len(ids))

    def prompt(self, turns: Sequence[Turn], grids: Sequence[Grid] = ()) -> NDArray[np.int64]:
        """ids int64 [T] of a dialogue that ends where the assistant is to answer its last question. `grids`: as in
        `encode`.

        Raises:
            SampleError: dialogue_too_long when the context holds no token of an answer; dialogue_many_images;
                dialogue_roles.
        """
        ids, _ = self._tokens(turns, (*grids, *[WHOLE] * num_images(turns)), answers=False)
        if len(ids) >= self.spec.context_length:
            raise SampleError("dialogue_too_long", got=f"{len(ids)} tokens", allowed=f"{self.spec.context_length - 1}")
        return ids

    def question(self, text: str, grids: Sequence[Grid] = (WHOLE,)) -> list[int]:
        """The prompt of one question about pictures with these tiles, which come first unless the text says where each
        is. Raises SampleError as `prompt`."""
        if text.count(IMAGE) != len(grids):
            text = f"{IMAGE}\n" * len(grids) + text.replace(IMAGE, " ")
        return self.prompt([Turn("user", text)], grids).tolist()

    def opening(self, metadata: Mapping[str, Any], caption: str) -> tuple[str, str]:
        """What is asked first in the dialogue of a sample, and what is said to it. Raises SampleError as `turns_of`."""
        turns = turns_of({} if self.template == PLAIN else metadata, caption)
        said = {turn.role: turn.content for turn in reversed(turns)}  # the first of each
        return said["user"], said.get("assistant", "")

    @property
    def reads_questions(self) -> bool:
        """Whether a prompt says what is asked; that of the template plain is the images alone."""
        return self.template != PLAIN

    def _tokens(
        self, turns: Sequence[Turn], grids: Sequence[Grid], *, answers: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """ids [T] and which of them are learned [T], uncut."""
        if self.system is not None and turns and turns[0].role != "system":
            turns = [Turn("system", self.system), *turns]
        if num_images(turns) > self.spec.max_images:
            raise SampleError(
                "dialogue_many_images", got=f"{num_images(turns)} images", allowed=f"{self.spec.max_images}"
            )
        segments = render(turns, self._template, answers=answers)
        texts = [self._written(segment) for segment in segments]
        is_learned = [not isinstance(segment, Image) and segment.is_learned for segment in segments]
        learned_chars = np.repeat(np.array(is_learned, dtype=bool), [len(text) for text in texts])
        num_before = np.concatenate([[0], np.cumsum(learned_chars)])
        pieces, spans = self._pieces("".join(texts))
        starts, stops = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        ids = np.array([*self._begin, *pieces], dtype=np.int64)
        learned = np.concatenate([np.zeros(len(self._begin), dtype=bool), num_before[stops] > num_before[starts]])
        is_picture = ids == IMAGE_ID
        pictures = [self.picture(grid) for grid in grids[: is_picture.sum()]]
        runs = np.ones(len(ids), dtype=np.int64)
        runs[is_picture] = [len(picture) for picture in pictures]
        ids = np.repeat(ids, runs)
        ids[np.repeat(is_picture, runs)] = [token for picture in pictures for token in picture]
        return ids, np.repeat(learned, runs)

    def picture(self, grid: Grid) -> list[int]:
        """The tokens of a picture, IMAGE_ID where one is read of an image."""
        return picture_ids(grid, self.spec.num_image_tokens, self._row_mark)

    def _written(self, segment: Segment) -> str:
        if isinstance(segment, Image):
            return IMAGE_MARK
        return self._mark(segment) if isinstance(segment, Token) else unmarked(segment.text)

    def _mark(self, token: Token) -> str:
        return self._pieces.mark(token.name) or (END_MARK if token.is_learned else token.name)


def check_images(encoded: Encoded, num_parts: int) -> None:
    """A dialogue speaks of as many images as its sample has.

    Raises:
        SampleError: dialogue_image_count.
    """
    if len(encoded.grids) != num_parts:
        raise SampleError("dialogue_image_count", got=f"{len(encoded.grids)} {IMAGE} in the text", allowed=num_parts)


def dialogue_fields(encoded: Sequence[Encoded | None], multiple: int = 8) -> Batch:
    """`dialogue_ids`, `dialogue_labels`, `dialogue_lengths` and `num_images` of a batch.

    T is the longest rounded up to a `multiple`, so it can pass the context by less than that. Padding has id 0 and no
    label. None is a row that was never filled: one token of padding, for no row may be empty.
    """
    rows = [Encoded(np.zeros(1, np.int64), np.full(1, NO_LABEL), ()) if row is None else row for row in encoded]
    lengths = [len(row.ids) for row in rows]
    longest = -(-max(lengths, default=1) // multiple) * multiple
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), NO_LABEL, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : lengths[place]] = torch.from_numpy(row.ids)
        labels[place, : lengths[place]] = torch.from_numpy(row.labels)
    return Batch(
        dialogue_ids=ids,
        dialogue_labels=labels,
        dialogue_lengths=torch.tensor(lengths, dtype=torch.int64),
        num_images=torch.tensor([row.num_images for row in rows], dtype=torch.int64),
    )


def grid_field(encoded: Sequence[Encoded | None]) -> Tensor:
    """`grids` of a batch."""
    rows = [() if row is None else row.grids for row in encoded]
    grids = torch.zeros(len(rows), max([0, *map(len, rows)]), len(Grid._fields), dtype=torch.int64)
    for place, row in enumerate(rows):
        if row:
            grids[place, : len(row)] = torch.tensor(row)
    return grids
