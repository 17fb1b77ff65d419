"""Pictures to look at or to search in: a folder of images, or shards; opened one at a time, by number.

A gallery decodes nothing by itself: what a picture becomes (the square of a tower, a tile of a grid) is its reader's
choice. Names are for people: a path below the folder, or the key and caption of a sample.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vlm_train.data import tiles
from vlm_train.data.decode import EncodedImage, decode_captions, decode_metadata, first_image, open_image
from vlm_train.data.local import regular
from vlm_train.data.patterns import expand_shards
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError
from vlm_train.types import WHOLE, ImageSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class Gallery(Protocol):
    """A numbered list of pictures."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a person calls the picture."""

    def open(self, index: int) -> EncodedImage:
        """The picture with its header read. Raises DataError or OSError when it cannot be had."""


class FolderGallery:
    """Every image file below a folder, at any depth, in the order of the names.

    Args:
        folder: the folder, or one image file.
    """

    def __init__(self, *, folder: Path) -> None:
        self.root = folder if folder.is_dir() else folder.parent
        found = [Path(place, name) for place, _, names in os.walk(folder) for name in names] or [folder]
        self.paths = sorted(path for path in found if path.suffix.lower() in SUFFIXES)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path below the folder."""
        return str(self.paths[index].relative_to(self.root))

    def open(self, index: int) -> EncodedImage:
        """See `Gallery.open`."""
        with open(self.paths[index], "rb", opener=regular) as file:  # a pipe would be waited for without end
            return open_image(file.read())


class ShardGallery:
    """The first image of every sample of some shards, in the order of the manifest.

    Args:
        shards: as `data.val.shards`.

    Raises:
        DataError: a shard is missing, compressed, or holds no usable sample.
    """

    def __init__(self, *, shards: str | Sequence[str]) -> None:
        self.source = ShardSource(shards=shards)
        self.keys: list[str] = self.source.manifest.table(["key"])["key"].to_pylist()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Key and first caption of the sample."""
        try:
            parts = self._parts(index)
            return f"{self.keys[index]} {decode_captions(parts, decode_metadata(parts))[0]}"
        except (DataError, OSError):
            return self.keys[index]

    def open(self, index: int) -> EncodedImage:
        """See `Gallery.open`."""
        return open_image(first_image(self._parts(index)))

    def _parts(self, index: int) -> dict[str, bytes]:
        (sample,) = self.source.read(np.array([index]))
        if isinstance(sample, DataError):
            raise sample
        return sample.parts

    def pixels(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] of the samples with these keys. A key that names no sample, several samples, or one that
        cannot be read is left out: no picture is better than a wrong one."""
        wanted = set(keys)
        rows = [row for row, key in enumerate(self.keys) if key in wanted]
        times = Counter(self.keys[row] for row in rows)
        found: dict[str, np.ndarray] = {}
        for row in rows:
            if times[self.keys[row]] == 1:
                try:
                    found[self.keys[row]] = self.open(row).decode()
                except (DataError, OSError):
                    continue
        return found


def open_gallery(where: str) -> Gallery:
    """The pictures of a folder (images at any depth, or tars), of one image, or of shards.

    Raises:
        DataError: there is nothing of the kind.
    """
    path = Path(where).expanduser()
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise _nothing(f"{where} does not exist")
        return FolderGallery(folder=path)
    if path.is_dir() and len(images := FolderGallery(folder=path)):
        return images
    try:
        shards = expand_shards(where)
    except DataError as error:
        raise _nothing(f"no image and no shard at {where}") from error
    return ShardGallery(shards=shards)


def _nothing(got: str) -> DataError:
    return DataError(
        "there are no pictures to search in",
        got=got,
        allowed=f"a folder with images ({' '.join(SUFFIXES)}) at any depth, or with shards; a glob or range of shards",
        remedy="images=FOLDER",
    )


def as_seen(image: EncodedImage, spec: ImageSpec) -> np.ndarray:
    """The picture as an image tower with `spec` is shown it in evaluation: uint8 [S, S, 3]. Raises SampleError."""
    return tiles.as_seen(image, WHOLE, spec)[0]
