"""Where the images of a batch are rendered to.

In a worker that is memory which the trainer's process can map, so that no pixel is copied between the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info


class Places:
    """Where the images of a batch are rendered to: one block, a place for each image that a row may have."""

    def __init__(self, num_rows: int, num_places: int, size: int) -> None:
        self._images = _room((num_rows, num_places, size, size, 3))
        self._pixels = self._images.numpy()

    def of_row(self, row: int, num_images: int) -> NDArray[np.uint8]:
        """[num_images, S, S, 3] to write to."""
        found: NDArray[np.uint8] = self._pixels[row, :num_images]
        return found

    def closed(self, num_images: Sequence[int]) -> Tensor:
        """[B, I, S, S, 3], black behind the images of a row."""
        for row, number in enumerate(num_images):
            self._pixels[row, number:] = 0
        return self._images


class PlacesAsNeeded:
    """The same with tiles, of which most rows have few: I is what the fullest row has. A picture is copied once."""

    def __init__(self, num_rows: int, size: int) -> None:
        self._rows = [np.empty((0, size, size, 3), np.uint8)] * num_rows
        self._size = size

    def of_row(self, row: int, num_images: int) -> NDArray[np.uint8]:
        """As of `Places`."""
        self._rows[row] = np.empty((num_images, self._size, self._size, 3), np.uint8)
        return self._rows[row]

    def closed(self, num_images: Sequence[int]) -> Tensor:
        """As of `Places`."""
        num_places = max([1, *num_images])
        images = _room((len(num_images), num_places, self._size, self._size, 3))
        for row, number in enumerate(num_images):
            images[row, :number] = torch.from_numpy(self._rows[row][:number])
            images[row, number:] = 0
        return images


def _room(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor, in a worker in memory that the trainer's process can map."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
