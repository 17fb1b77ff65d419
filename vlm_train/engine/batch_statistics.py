"""Whether a batch is what one thinks it is: the figures beside the picture of the first batch.

Most data bugs show here before any GPU hour is spent: normalised pixels whose mean is far from 0, captions that are
cut, captions that their tokens do not spell, the same sample twice.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import torch

from vlm_train.types import Batch, ImageSpec, Tokenizer

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatistics:
    """Figures of the rows that count.

    `pixel_mean`, `pixel_std`: per channel, after normalisation. `token_lengths`: real tokens of each caption.
    `num_truncated`: captions whose end the model does not read. `num_altered`: further captions that the tokens do not
    spell back, case and white space aside (unknown tokens, stripped accents). `num_constant_images`: of one colour.
    `num_repeated_samples`, `num_repeated_captions`: beyond the first of each; a repeated caption is a wrong negative.
    """

    num_samples: int
    pixel_mean: Triple
    pixel_std: Triple
    token_lengths: tuple[int, ...]
    context_length: int
    num_truncated: int
    num_altered: int
    num_constant_images: int
    num_repeated_samples: int
    num_repeated_captions: int


def batch_statistics(batch: Batch, tokenizer: Tokenizer, image: ImageSpec) -> BatchStatistics:
    """Measures a batch on the host. `image`: how the tower normalises its pixels."""
    keep = batch["weights"].cpu() != 0
    rows = keep.nonzero().flatten().tolist()
    images = _images(batch, keep)
    mean, std = _normalised_moments(images, image)
    captions = [batch["captions"][row] for row in rows]
    ids, lengths = batch["text_ids"].cpu(), batch["text_mask"].cpu().sum(1)
    differs = [_letters(tokenizer.decode(ids[row].tolist())) != _letters(batch["captions"][row]) for row in rows]
    is_full = [int(lengths[row]) >= tokenizer.spec.context_length for row in rows]
    return BatchStatistics(
        num_samples=len(rows),
        pixel_mean=mean,
        pixel_std=std,
        token_lengths=tuple(int(lengths[row]) for row in rows),
        context_length=tokenizer.spec.context_length,
        num_truncated=sum(a and b for a, b in zip(differs, is_full, strict=True)),
        num_altered=sum(a and not b for a, b in zip(differs, is_full, strict=True)),
        num_constant_images=int((images.amax((2, 3)) == images.amin((2, 3))).all(1).sum()),
        num_repeated_samples=len(rows) - len(torch.unique(batch["uids"].cpu()[keep], dim=0)),
        num_repeated_captions=len(rows) - len(set(captions)),
    )


def _images(batch: Batch, keep: torch.Tensor) -> torch.Tensor:
    """[N, 3, S, S] of the rows to `keep`; of dialogues the images that are there."""
    images = batch["images"].cpu()[keep]
    if "num_images" not in batch:
        return images
    images = images if images.ndim == 5 else images[:, None]
    return images[torch.arange(images.shape[1]) < batch["num_images"].cpu()[keep][:, None]]


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).casefold().split())


def _normalised_moments(images: torch.Tensor, image: ImageSpec) -> tuple[Triple, Triple]:
    """Mean and standard deviation by channel of what the tower computes with, from exact counts of the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel, (shift, scale) in enumerate(zip(image.mean, image.std, strict=True)):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share = counts / counts.sum().clamp(min=1)
        mean = (share * levels).sum()
        means.append(float(mean / 255 - shift) / scale)
        deviations.append(float((share * (levels - mean) ** 2).sum().sqrt()) / 255 / scale)
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])
