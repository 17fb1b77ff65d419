"""A model whose features are a fixed function of each row alone, and batches for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.types import Batch, rank_share

WIDTH = 16
# items share captions ("item 3" is the caption of several), so ties happen; some have one caption, some three
CAPTIONS = [[f"item {i}"] + [f"other {i} {j}" for j in range(i % 3)] for i in range(20)] + [["item 3"], ["item 3"]]
NAMES = [f"item {i}" for i in range(7)]
LABELS = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, -1, 0]  # images 0..6 show their class, the rest do not; one has no label


def vector(name: str) -> Tensor:
    """A unit vector that depends on nothing but the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    return F.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


class ToyEmbedder:
    """Image i (its first pixel says i) lies near the caption "item i"; texts are looked up by their words."""

    def __init__(self, noise: float = 1.0) -> None:
        self.noise = noise

    def images(self, batch: Batch) -> Tensor:
        names = [f"item {int(pixel)}" for pixel in batch["images"][:, 0, 0, 0]]
        return torch.stack([F.normalize(vector(name) + self.noise * vector("noise " + name), dim=0) for name in names])

    def others(self, name: str, batch: Batch) -> Tensor:
        return self.images(batch)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([vector(text) for text in texts]) if texts else torch.zeros(0, WIDTH)


def batches(
    all_captions: list[list[str]], batch_size: int, labels: list[int] | None = None, metadata: list[dict] | None = None
) -> Iterator[Batch]:
    """This rank's share, as the evaluation loader cuts it: equally many batches on all ranks, padded with weight 0."""
    total = len(all_captions)
    world_size = collectives.world_size()
    start, stop = rank_share(total, collectives.rank(), world_size)
    largest = -(-total // world_size)
    for first in range(0, largest, batch_size):
        rows = list(range(start + first, min(start + first + batch_size, stop)))
        num_padding = batch_size - len(rows)
        images = torch.zeros(batch_size, 3, 2, 2, dtype=torch.uint8)
        images[: len(rows), 0, 0, 0] = torch.tensor(rows, dtype=torch.uint8)
        yield Batch(
            images=images,
            weights=torch.tensor([1.0] * len(rows) + [0.0] * num_padding),
            all_captions=[all_captions[row] for row in rows] + [["padding"]] * num_padding,
            keys=[f"key{row}" for row in rows] + [""] * num_padding,
            metadata=[metadata[row] if metadata else {} for row in rows] + [{}] * num_padding,
            labels=torch.tensor([labels[row] if labels else -1 for row in rows] + [-1] * num_padding),
        )


class ToyTrain:
    """A training split of pictures 0, 1, ... with these labels; image i lies where the validation image i lies."""

    def __init__(self, labels: list[int], captions: list[str] | None = None) -> None:
        self.labels, self.texts = labels, captions or []

    def batches(self) -> Iterator[Batch]:
        return batches([[]] * len(self.labels), 5, self.labels)

    def captions(self) -> Iterator[str]:
        return iter(self.texts)
