"""Raw records to the `Batch` that the model is handed, written once, where it stays.

This is the middle of the road (decode, transform, tokenize, collate) as one object, because it must behave the same in
every worker: it holds no state, and its randomness comes from the sample's own key. The pixels of a batch are one block
of memory that samples are rendered into; in a worker it is shared with the trainer's process, so that no pixel is
copied between the two. Text is trimmed to the longest of the batch, rounded up to a multiple of 8 (whole tensor-core
tiles), where the tower allows it; trailing padding cannot change a result there, so ranks may differ in length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_train.data import decode
from vlm_train.data.decode import EncodedImage, SampleError
from vlm_train.data.dialogue import DialogueEncoder, Encoded, dialogue_fields, grid_field
from vlm_train.data.modalities import reading
from vlm_train.data.places import Places, PlacesAsNeeded
from vlm_train.data.rendering import render
from vlm_train.data.tiles import render_tiles
from vlm_train.data.transforms import Plan, Transform, Uniforms, keyed_draw, keyed_generator
from vlm_train.errors import ConfigError
from vlm_train.imaging import recolour
from vlm_train.types import MODALITIES, WHOLE, Batch, Grid, ModalitySpec, RawSample, Tokenizer

_TEXT_MULTIPLE = 8


class SampleEncoder:
    """Raw records -> batch.

    Args:
        transform: how an image becomes a square of S pixels.
        tokenizer: how a caption becomes ids.
        colours_later: leave colour jitter and grey to the trainer, where a GPU does them: batches of a transform that
            has them get `finish`, the factors for `imaging.recolour`, and pixels without them. Of samples that may have
            several images they are done here all the same.
        hard_captions: how many captions that are almost right a sample brings, drawn from `negatives` of KEY.json;
            batches get the `hard_` fields.
        contents: batches get `contents`, by which equal images and equal captions are known.
        modalities: what a sample brings beside image and text; batches get a field for each, and `there`.
        dialogues: for a model that answers: batches get the `dialogue_` fields and `num_images`, and I = `max_images`
            places for the images of a sample, of which it may have none. Without it a sample's first image is read.
            With tiles I is as many as a batch needs, and batches of evaluation, or of tiles in a map, get `grids`.

    Raises:
        ConfigError: tiles with a transform that takes parts of images.
    """

    def __init__(
        self,
        *,
        transform: Transform,
        tokenizer: Tokenizer,
        colours_later: bool = False,
        hard_captions: int = 0,
        contents: bool = False,
        modalities: Sequence[ModalitySpec] = (),
        dialogues: DialogueEncoder | None = None,
    ) -> None:
        self.transform, self.tokenizer, self.dialogues = transform, tokenizer, dialogues
        self.num_places = 1 if dialogues is None else dialogues.spec.num_places
        self.max_tiles = 1 if dialogues is None else dialogues.spec.max_tiles
        self.reads_grids = dialogues is not None and dialogues.spec.tile_layout == "map"
        if self.max_tiles > 1 and transform.whole is None:
            raise ConfigError("tiles show pictures whole, and this training takes parts of them",
                              got=f"model.max_tiles={self.max_tiles} and a crop", allowed="tiles, or a crop",
                              remedy="data.augment.scale=null")  # fmt: skip
        self.colours_later = colours_later
        self.hard_captions, self.contents, self.modalities = hard_captions, contents, tuple(modalities)

    def draft(self, num_rows: int) -> Draft:
        """Room for a batch of `num_rows` samples, all rows blank."""
        return Draft(self, num_rows)

    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T], T as short as the tower allows."""
        text_ids, text_mask = self.tokenizer(captions)
        if self.tokenizer.spec.pad_to_max:
            return text_ids, text_mask
        longest = int(text_mask.any(dim=0).nonzero().max()) + 1 if text_mask.any() else 1
        length = -(-longest // _TEXT_MULTIPLE) * _TEXT_MULTIPLE  # slicing stops at the context length by itself
        return text_ids[:, :length].contiguous(), text_mask[:, :length].contiguous()


class Draft:
    """A batch in the making: `put` fills rows in any order, `batch` closes it.

    A row that was never filled stays blank: black, no text, uid 0. So are the places of images that a row has not.
    """

    def __init__(self, encoder: SampleEncoder, num_rows: int) -> None:
        self._encoder = encoder
        size = encoder.transform.size
        if encoder.max_tiles > 1:
            self._places: Places | PlacesAsNeeded = PlacesAsNeeded(num_rows, size)
        else:
            self._places = Places(num_rows, encoder.num_places, size)
        self._num_images = [0] * num_rows
        self._factors = torch.ones(num_rows, 3)
        self._recolours_later = encoder.colours_later and encoder.num_places == 1
        self._uids = [bytes(16)] * num_rows
        self._keys = [""] * num_rows
        self._captions: list[list[str]] = [[] for _ in range(num_rows)]
        self._chosen = [""] * num_rows
        self._metadata: list[dict[str, Any]] = [{} for _ in range(num_rows)]
        self._hard: list[list[str]] = [[] for _ in range(num_rows)]
        self._dialogues: list[Encoded | None] = [None] * num_rows
        self._contents = torch.zeros(num_rows, 2, dtype=torch.int64)
        self._draws = torch.zeros(num_rows, dtype=torch.int64)
        self._modalities = {spec.name: reading.room(spec, num_rows) for spec in encoder.modalities}
        self._there = torch.zeros(num_rows, len(MODALITIES), dtype=torch.bool)

    def put(self, row: int, raw: RawSample, *, seed: int = 0, visit: int | None = None) -> None:
        """Decodes and transforms one record into a row.

        `visit` None is evaluation: the first caption. In training it is the position in the stream, which is another
        each time that a sample comes up; one of the captions is drawn, keyed as the crop is by (seed, visit, uid).

        Raises:
            SampleError: the record cannot be used; the row is as it was.
        """
        metadata = decode.decode_metadata(raw.parts)
        captions = decode.decode_captions(raw.parts, metadata)
        chosen = 0
        if visit is not None and len(captions) > 1:
            chosen = int(keyed_generator(seed, visit, raw.uid, "caption").random() * len(captions))
        hard = self._hard_captions(raw, metadata, seed, visit or 0)
        dialogues = self._encoder.dialogues
        dialogue = None if dialogues is None else dialogues.read(raw.parts, metadata, captions[chosen])
        plan, num_images = self._put_images(row, raw, dialogue, seed, visit or 0)
        self._put_modalities(row, raw, metadata, plan)
        self._uids[row], self._keys[row], self._metadata[row] = raw.uid, raw.key, metadata
        self._captions[row], self._chosen[row] = captions, captions[chosen]
        self._hard[row], self._dialogues[row] = hard, dialogue
        self._draws[row] = keyed_draw(seed, visit or 0, raw.uid)
        if self._encoder.contents:
            image = next((raw.parts[name] for name in decode.image_parts(raw.parts)), None)
            self._contents[row] = torch.tensor([_content(image), _content(captions[chosen].encode())])
        self._num_images[row] = num_images

    def _hard_captions(self, raw: RawSample, metadata: dict[str, Any], seed: int, visit: int) -> list[str]:
        """As many of the `negatives` of KEY.json as are wanted and there, without repetition."""
        num = self._encoder.hard_captions
        texts = metadata.get("negatives") if num else None
        if not texts:
            return []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise SampleError("metadata_captions", got=str(texts)[:80], allowed="`negatives`: a list of strings")
        uniforms = keyed_generator(seed, visit, raw.uid, "hard")
        places = np.argsort([uniforms.random() for _ in texts], kind="stable")
        return [texts[place] for place in places[:num]]

    def _put_modalities(self, row: int, raw: RawSample, metadata: dict[str, Any], plan: Plan | None) -> None:
        """What there is beside the image; nothing where there is no image that it goes with."""
        values = {
            spec.name: None if plan is None else reading.read(spec, raw.parts, metadata, plan)
            for spec in self._encoder.modalities
        }
        for name, value in values.items():
            self._there[row, MODALITIES.index(name)] = value is not None
            self._modalities[name][row] = 0 if value is None else torch.from_numpy(value)

    def _put_images(
        self, row: int, raw: RawSample, dialogue: Encoded | None, seed: int, visit: int
    ) -> tuple[Plan | None, int]:
        """The pictures of a sample, each by draws of its own; returns the plan of the first one, None without any, and
        how many images they are."""
        if dialogue is None:
            pictures, grids = [decode.first_image(raw.parts)], [WHOLE]
        else:
            pictures = [raw.parts[name] for name in decode.image_parts(raw.parts)]
            grids = list(dialogue.grids)
        num_images = sum(grid.num_images for grid in grids)
        squares, start = self._places.of_row(row, num_images), 0
        plans = []
        for place, (data, grid) in enumerate(zip(pictures, grids, strict=True)):
            uniforms = keyed_generator(seed, visit, raw.uid, f"image {place}" if place else "image")
            taken = squares[start : start + grid.num_images]
            plans.append(self._render(row, taken, decode.open_image(data), grid, uniforms))
            start += grid.num_images
        return plans[0] if plans else None, num_images

    def _render(
        self, row: int, squares: NDArray[np.uint8], image: EncodedImage, grid: Grid, uniforms: Uniforms
    ) -> Plan:
        """One picture into [N, S, S, 3]: itself or its overview, and its tiles."""
        transform = self._encoder.transform
        plan = transform.plan(image.width, image.height, uniforms)
        min_width, min_height = plan.min_decoded
        pixels = image.decode(min_width=min_width, min_height=min_height, fast=not plan.exact)
        render(pixels, plan, squares[0])
        if grid != WHOLE:
            assert transform.whole is not None
            render_tiles(image, grid, transform.whole, plan, squares[1:])
        if plan.colours is None:
            return plan
        factors = torch.tensor(plan.colours)
        if self._recolours_later:
            self._factors[row] = factors
        else:
            view = torch.from_numpy(squares[:1]).permute(0, 3, 1, 2)
            view.copy_(recolour(view, factors[None]))
        return plan

    def batch(self, *, weights: Sequence[float], evaluation: bool = False) -> Batch:
        """The batch. Shapes as in `types.Batch`; `evaluation` adds `all_captions` and `metadata`."""
        (text_ids, text_mask), hard = self._texts()
        images = self._places.closed(self._num_images).permute(0, 1, 4, 2, 3)
        labels = [decode.decode_label(metadata) for metadata in self._metadata]
        batch = Batch(
            images=images[:, 0] if self._encoder.num_places == 1 else images,
            text_ids=text_ids,
            text_mask=text_mask,
            weights=torch.tensor(weights, dtype=torch.float32),
            uids=torch.frombuffer(bytearray(b"".join(self._uids)), dtype=torch.int64).reshape(-1, 2),
            labels=torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64),
            draws=self._draws,
            captions=self._chosen,
            keys=self._keys,
        )
        batch.update(hard)
        if self._encoder.dialogues is not None:
            batch.update(dialogue_fields(self._dialogues))
        if self._modalities:
            batch.update(Batch(**self._modalities, there=self._there))  # type: ignore[typeddict-item]
        if self._encoder.contents:
            batch["contents"] = self._contents
        if self._encoder.transform.recolours and self._recolours_later:
            batch["finish"] = self._factors
        if evaluation:
            batch["all_captions"], batch["metadata"] = self._captions, self._metadata
        if self._encoder.reads_grids or (evaluation and self._encoder.max_tiles > 1):
            batch["grids"] = grid_field(self._dialogues)
        return batch

    def _texts(self) -> tuple[tuple[Tensor, Tensor], Batch]:
        """ids and mask of the captions, and the `hard_` fields where they are wanted: as long as each other."""
        num, each = len(self._chosen), self._encoder.hard_captions
        hard = [text for texts in self._hard for text in [*texts, *[""] * (each - len(texts))]]
        ids, mask = self._encoder.text([*self._chosen, *hard])
        if not each:
            return (ids, mask), Batch()
        counts = torch.tensor([[place < len(texts) for place in range(each)] for texts in self._hard])
        fields = Batch(
            hard_text_ids=ids[num:].unflatten(0, (num, each)),
            hard_text_mask=mask[num:].unflatten(0, (num, each)),
            hard_counts=counts,
        )
        return (ids[:num], mask[:num]), fields


def _content(part: bytes | None) -> int:
    """63 bits that tell a content. Negative for none alone, since a negative id agrees with nothing."""
    return -1 if part is None else int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little") >> 1
