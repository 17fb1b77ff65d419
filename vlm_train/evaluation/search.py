"""Searching pictures by text: embed a gallery once, rank it for each text by cosine.

1. Pictures are decoded by threads (the decoders release the interpreter lock) a few batches ahead of the model.
2. A picture that cannot be used is reported and takes part in nothing; only a gallery without any usable picture is an
   error.
3. Ranking is exact (see `metrics`): equal scores are equal, and are listed in gallery order.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vlm_train.errors import DataError
from vlm_train.evaluation.base import Embed
from vlm_train.evaluation.metrics import on_grid
from vlm_train.types import Batch

_BATCH_SIZE = 64
_BATCHES_AHEAD = 3
_ROWS_PER_TILE = 1 << 16

Load = Callable[[int], np.ndarray]
"""Number of a picture -> uint8 [S, S, 3] as the image tower reads it. Raises DataError or OSError."""


@dataclass(slots=True)
class Index:
    """An embedded gallery. `features` fp32 [N, D] on the host, unit rows; `pictures`: the number of each row in the
    gallery; `unusable`: (number, reason) of the pictures that have no row."""

    features: Tensor
    pictures: list[int]
    unusable: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer. `picture`: its number in the gallery; `score`: cosine, -1..1."""

    picture: int
    score: float


def index_pictures(embed: Embed, load: Load, num_pictures: int, progress: Callable[[int, int], None]) -> Index:
    """Embeds pictures 0..num_pictures - 1.

    Args:
        embed: the model.
        load: decodes one picture; called from several threads.
        num_pictures: size of the gallery.
        progress: called with (done, total) after each batch.

    Raises:
        DataError: not one picture could be used.
    """
    features, pictures, unusable = [], [], []
    for batch in _batches(load, num_pictures):
        good = [(number, pixels) for number, pixels in batch if isinstance(pixels, np.ndarray)]
        unusable += [(number, reason) for number, reason in batch if isinstance(reason, str)]
        if good:
            images_BSS3 = torch.from_numpy(np.stack([pixels for _, pixels in good]))
            features.append(embed.images(Batch(images=images_BSS3.permute(0, 3, 1, 2).contiguous())).float().cpu())
            pictures += [number for number, _ in good]
        progress(len(pictures) + len(unusable), num_pictures)
    if not features:
        raise DataError(
            "not one picture could be used",
            got=f"{num_pictures} pictures; the first: {unusable[0][1] if unusable else 'none'}",
            allowed="JPEG, PNG, WebP, GIF or BMP files that a viewer can open",
        )
    return Index(features=torch.cat(features), pictures=pictures, unusable=unusable)


def search(index: Index, texts_QD: Tensor, num_hits: int) -> list[list[Hit]]:
    """The `num_hits` best pictures of each text, best first; fewer where the gallery is smaller.

    Raises:
        VlmError: features that are not finite or not of unit length.
    """
    queries_QD = on_grid(texts_QD.cpu(), "Text features")
    parts = [
        queries_QD @ on_grid(tile_ND, "Image features").T  # exact in fp64, see metrics
        for tile_ND in index.features.split(_ROWS_PER_TILE)
    ]
    scores_QN = torch.cat(parts, dim=1)
    order_QN = scores_QN.argsort(dim=1, descending=True, stable=True)[:, :num_hits]
    return [
        [Hit(index.pictures[row], float(scores[row])) for row in order.tolist()]
        for scores, order in zip(scores_QN, order_QN, strict=True)
    ]


def _batches(load: Load, num_pictures: int) -> Iterator[Sequence[tuple[int, np.ndarray | str]]]:
    """(number, pixels or the reason why there are none), in order, decoded ahead of the reader."""

    def attempt(number: int) -> tuple[int, np.ndarray | str]:
        try:
            return number, load(number)
        except DataError as error:
            return number, error.what.replace("_", " ")
        except OSError as error:
            return number, error.strerror or str(error)

    numbers = iter(range(num_pictures))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pending: deque[list] = deque()
        while True:
            while len(pending) < _BATCHES_AHEAD and (chunk := list(itertools.islice(numbers, _BATCH_SIZE))):
                pending.append([pool.submit(attempt, number) for number in chunk])
            if not pending:
                return
            yield [future.result() for future in pending.popleft()]
