"""The figures beside the first batch, against batches whose faults are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.engine.batch_statistics import batch_statistics
from vlm_train.types import Batch, ImageSpec

SPEC = ImageSpec(size=4)


class Accents:
    """A tokenizer that cannot spell everything, as one with unknown tokens."""

    def __init__(self, tokenizer: BytePairTokenizer) -> None:
        self.tokenizer, self.spec = tokenizer, tokenizer.spec

    def __call__(self, texts):
        return self.tokenizer([text.replace("é", "") for text in texts])

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids)

    def save(self, directory: str) -> None:
        raise NotImplementedError


def make_batch(captions: list[str], tokenizer, images: torch.Tensor, weights: list[float] | None = None) -> Batch:
    ids, mask = tokenizer(captions)
    uids = torch.tensor([[hash(caption) % 1000, row // 2] for row, caption in enumerate(captions)])
    return Batch(
        images=images, text_ids=ids, text_mask=mask, captions=captions, uids=uids, step=0,
        weights=torch.tensor(weights or [1.0] * len(captions)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.train(["a red square"] * 3, vocab_size=259, context_length=16)


def test_pixels_are_measured_after_normalisation(tokenizer: BytePairTokenizer) -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = batch_statistics(make_batch(["a", "b", "c", "d", "e"], tokenizer, images), tokenizer, SPEC)
    raw = images.double().numpy() / 255
    normalised = (raw - np.array(SPEC.mean)[:, None, None]) / np.array(SPEC.std)[:, None, None]
    assert found.pixel_mean == pytest.approx(normalised.mean((0, 2, 3)))
    assert found.pixel_std == pytest.approx(normalised.std((0, 2, 3)))
    assert found.pixel_mean != pytest.approx(raw.mean((0, 2, 3)), rel=0.1)  # the wrong twin: not normalised


def test_each_fault_is_counted_once(tokenizer: BytePairTokenizer) -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[2] = torch.tensor([9, 99, 199], dtype=torch.uint8)[:, None, None]  # one colour, though not grey
    images[3] = 0
    # byte-level tokens: 14 letters and the leading space fill a context of 16 with its two ends
    captions = ["Red  Square", "café", "same", "same", "exactly 13chr", "much longer than the context"]
    batch = make_batch(captions, Accents(tokenizer), images)
    found = batch_statistics(batch, Accents(tokenizer), SPEC)
    assert found.token_lengths[4] == found.token_lengths[5] == found.context_length == 16
    assert (found.num_truncated, found.num_altered) == (1, 1)
    assert (found.num_repeated_captions, found.num_repeated_samples) == (1, 1)
    assert (found.num_constant_images, found.num_samples) == (2, 6)


def test_rows_of_weight_zero_do_not_count(tokenizer: BytePairTokenizer) -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[:2] = 255
    found = batch_statistics(make_batch(["a", "b", ""], tokenizer, images, [1.0, 1.0, 0.0]), tokenizer, SPEC)
    assert found.num_samples == 2 and len(found.token_lengths) == 2
    assert found.pixel_mean == pytest.approx([(1 - m) / s for m, s in zip(SPEC.mean, SPEC.std, strict=True)])
