"""Galleries full of ties, cut into unequal shares, and what a rank must find about its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import VlmError
from vlm_train.evaluation.metrics import Standing, credit_at_k, on_grid, standings
from vlm_train.evaluation.ranking import check_unit, mean_credit, one_row_per_text, paired_standings

NUM_CASES = 12


def gallery(seed: int, num_images: int, num_vectors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images and captions out of few vectors, so that many scores are equal; one to four captions an image."""
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(num_vectors, 5, generator=generator), dim=1)
    captions = torch.randint(1, 5, (num_images,), generator=generator)
    item = torch.arange(num_images).repeat_interleave(captions)
    pick = lambda num: vectors[torch.randint(0, num_vectors, (num,), generator=generator)]  # noqa: E731
    return pick(num_images), pick(len(item)), item


def brute_force(images: Tensor, texts: Tensor, item: Tensor) -> tuple[Standing, Standing]:
    """By all scores at once (`metrics.standings`, which has a brute force of its own)."""
    images, texts, items = on_grid(images, "images"), on_grid(texts, "texts"), torch.arange(len(images))
    return standings(texts, images, item, items), standings(images, texts, items, item)


def mine(images: Tensor, texts: Tensor, item: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor, Tensor, slice, slice]:
    """The part of this rank: images from one cut to the next, with their captions."""
    start, stop = cuts[collectives.rank()], cuts[collectives.rank() + 1]
    which = (item >= start) & (item < stop)
    own = which.nonzero().flatten()
    text = slice(int(own[0]), int(own[-1]) + 1) if len(own) else slice(0, 0)
    return images[start:stop], texts[text], item[text] - start, slice(start, stop), text


def same(got: Standing, expected: Standing, part: slice) -> bool:
    return all(torch.equal(mine, whole[part]) for mine, whole in zip(got, expected, strict=True))


def cuts_of(seed: int, num_images: int, world_size: int) -> list[int]:
    """Unequal shares; some ranks hold nothing."""
    inner = torch.randint(0, num_images + 1, (world_size - 1,), generator=torch.Generator().manual_seed(seed))
    return [0, *sorted(inner.tolist()), num_images]


def on_ranks() -> list[list[bool]]:
    found = []
    for seed in range(NUM_CASES):
        images, texts, item = gallery(seed, 3 + 2 * seed, 1 + seed)
        by_text, by_image = brute_force(images, texts, item)
        own_images, own_texts, own_item, image, text = mine(
            images, texts, item, cuts_of(seed, len(images), collectives.world_size())
        )
        got_text, got_image = paired_standings(own_images, own_texts, own_item)
        alone = [float(credit_at_k(by_text, k).sum()) / len(texts) for k in (1, 3)]
        credits = list(mean_credit(got_text, (1, 3)).values())
        # the twin: what a rank would say that ranked its own share among itself
        itself = brute_force(own_images, own_texts, own_item)[0] if len(own_images) else got_text
        found.append(
            [
                same(got_text, by_text, text),
                same(got_image, by_image, image),
                credits == pytest.approx(alone, abs=1e-12),
                same(itself, by_text, text),
            ]
        )
    return found


SHARED = [["a", "b", "a"], [], ["b", "c", "a", "c"]]


def words() -> list[list[float]]:
    """Features of captions that other ranks hold too, with the noise that another batch gives."""
    rank, num = collectives.rank(), collectives.world_size()
    captions = SHARED[rank] if num == 3 else []
    noise = torch.arange(len(captions))[:, None] * 1e-7 + rank * 1e-6
    features = torch.tensor([[float(ord(word))] for word in captions]).reshape(-1, 1) + noise
    return one_row_per_text(features, captions).tolist()


def broken() -> str:
    rows = F.normalize(torch.ones(2 + collectives.rank(), 3), dim=1)
    if collectives.rank() == 1:
        rows[1] = torch.nan
    try:
        check_unit(rows, "Image features")
    except VlmError as error:
        return str(error)
    return ""
