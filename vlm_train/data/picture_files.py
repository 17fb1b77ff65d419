"""A picture in a file, as a model that answers is shown it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlm_train.data.gallery import open_gallery
from vlm_train.data.tiles import as_seen, grid_of
from vlm_train.errors import DataError
from vlm_train.types import DialogueSpec, Grid, ImageSpec


def open_picture(path: Path, dialogue: DialogueSpec, image: ImageSpec) -> tuple[Tensor, Grid]:
    """Images uint8 [N, 3, S, S] of a picture, which is one or, with tiles, several, and these tiles.

    Raises:
        DataError: there is no such file, or it is not one picture that can be read.
    """
    if not path.is_file():
        raise DataError("there is no such file", got=path, allowed="an image file")
    gallery = open_gallery(str(path))
    if len(gallery) != 1:
        raise DataError("this file is not one picture", got=f"{path}: {len(gallery)} pictures", allowed="an image file")
    try:
        opened = gallery.open(0)
    except OSError as error:
        raise DataError("this file cannot be read", got=f"{path}: {error.strerror}") from error
    grid = grid_of(opened.width, opened.height, dialogue)
    return torch.from_numpy(as_seen(opened, grid, image)).permute(0, 3, 1, 2), grid
