"""A batch as the loader hands it over, with texts of one length and images of nothing: what a plan runs, and what is
rehearsed before a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm_train.errors import ConfigError
from vlm_train.types import IMAGE_ID, MODALITIES, NO_LABEL, Batch


class Maker(Protocol):
    """Makes what is no whole number: `shapes.Shapes` or `Zeros`."""

    def of_bytes(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Tensors of these shapes and types."""


class Zeros:
    """Makes real tensors."""

    def of_bytes(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Black pictures, silence."""
        return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a sample is taken to hold. `tokens`: of its text or, with those of its images, of its dialogue; `images`: of
    a dialogue, None where samples are none; `hard`: hard captions."""

    tokens: int
    images: int | None = None
    hard: int = 0


def sample_of(model: Any, tokens: int | None, hard: int) -> Sample:
    """A sample with a text of so many tokens, or the longest; of a dialogue, with one image.

    Raises:
        ConfigError: more tokens than the model reads, or too few for a dialogue with its image.
    """
    is_dialogue = hasattr(model, "dialogue")
    longest = model.dialogue.context_length if is_dialogue else model.text_spec.context_length
    least = model.tokens_per_image + 2 if is_dialogue else 2
    if tokens is not None and not least <= tokens <= longest:
        raise ConfigError("the model does not read texts of this length", got=f"tokens={tokens}",
                          allowed=f"{least} to {longest}", remedy=f"tokens={longest}")  # fmt: skip
    if is_dialogue:
        return Sample(tokens=tokens or longest, images=1)
    return Sample(tokens=tokens or longest, hard=hard)


def largest_sample(model: Any, hard: int) -> Sample:
    """One that takes as much memory as any may: the longest text, and as many images as a dialogue has room for."""
    sample = sample_of(model, None, hard)
    if sample.images is None:
        return sample
    room = (sample.tokens - 2) // model.tokens_per_image
    return Sample(tokens=sample.tokens, images=max(1, min(model.dialogue.num_places, room)))


def make_batch(maker: Maker, parts: Any, sample: Sample, num_rows: int) -> Batch:
    """A batch of `num_rows` equal samples; whole numbers are real, all else is what `maker` makes."""
    model = parts.model
    fields = _dialogue(model, sample, num_rows) if sample.images is not None else _pair(sample, num_rows)
    side, images = model.image_spec.size, {} if sample.images is None else {"I": sample.images}
    described: dict[str, Any] = {"images": ((num_rows, *images.values(), 3, side, side), torch.uint8)}
    for modality in model.modalities:
        whole = modality.name == "regions"
        described[modality.name] = ((num_rows, *modality.shape), torch.int64 if whole else torch.float32)
    fields |= maker.of_bytes(described)
    fields["there"] = torch.ones(num_rows, len(MODALITIES), dtype=torch.bool)
    fields["draws"] = torch.zeros(num_rows, dtype=torch.int64)
    fields["contents"] = torch.arange(2 * num_rows).view(num_rows, 2)
    fields["weights"] = torch.ones(num_rows)
    return Batch(**fields)  # type: ignore[typeddict-item]


def _pair(sample: Sample, num_rows: int) -> dict[str, Tensor]:
    shape = (num_rows, sample.tokens)
    fields = {"text_ids": torch.ones(shape, dtype=torch.int64), "text_mask": torch.ones(shape, dtype=torch.bool)}
    if sample.hard:
        hard = (num_rows, sample.hard, sample.tokens)
        fields |= {"hard_text_ids": torch.ones(hard, dtype=torch.int64)}
        fields |= {"hard_text_mask": torch.ones(hard, dtype=torch.bool)}
        fields |= {"hard_counts": torch.ones(hard[:2], dtype=torch.bool)}
    return fields


def _dialogue(model: Any, sample: Sample, num_rows: int) -> dict[str, Tensor]:
    """The images first, and then words, each of which is to be told."""
    assert sample.images is not None
    ids_BT = torch.ones(num_rows, sample.tokens, dtype=torch.int64)
    ids_BT[:, : sample.images * model.tokens_per_image] = IMAGE_ID
    labels_BT = torch.where(ids_BT == IMAGE_ID, NO_LABEL, ids_BT)
    return {
        "dialogue_ids": ids_BT,
        "dialogue_labels": labels_BT,
        "dialogue_lengths": torch.full((num_rows,), sample.tokens),
        "num_images": torch.full((num_rows,), sample.images),
        "text_ids": torch.ones(num_rows, 1, dtype=torch.int64),
        "text_mask": torch.ones(num_rows, 1, dtype=torch.bool),
    }
