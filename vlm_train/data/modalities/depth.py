"""KEY.depth.png: how far each pixel of the picture is, as grey of 8 or 16 bits.

What a value means is the dataset's choice; it is told in 0..1, as a share of the greatest that the file can hold. The
map is cut, resized and mirrored by the picture's own plan, so it stays on the picture, whatever its own size.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_train.data.decode import MAX_PIXELS, SampleError
from vlm_train.data.modalities.members import DEPTH
from vlm_train.data.rendering import render_plane
from vlm_train.data.transforms import Plan

_LARGEST = {"L": 255.0, "I;16": 65535.0}  # by Pillow's name of a grey PNG of 8 and of 16 bits


def read_depth(
    parts: Mapping[str, bytes], metadata: Mapping[str, Any], plan: Plan, shape: tuple[int, ...]
) -> NDArray[np.float32] | None:
    """float32 [1, S, S] in 0..1, `shape` being (1, plan.size, plan.size); None where there is no depth.

    Raises:
        SampleError: depth_corrupt, also for a PNG that is not grey; depth_too_large above the pixel cap of images.
    """
    return None if DEPTH not in parts else render_plane(decode_depth(parts[DEPTH]), plan)[None]


def decode_depth(data: bytes) -> NDArray[np.float32]:
    """float32 [H, W] in 0..1. Raises SampleError."""
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
        if picture.width * picture.height > MAX_PIXELS:
            raise SampleError("depth_too_large", got=f"{picture.width} x {picture.height}", allowed=MAX_PIXELS)
        if picture.mode not in _LARGEST:
            raise SampleError("depth_corrupt", got=f"mode {picture.mode}", allowed="grey of 8 or 16 bits")
        return np.asarray(picture).astype(np.float32) / np.float32(_LARGEST[picture.mode])
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError("depth_too_large", got=error) from None
    except Exception as error:  # decoders raise whatever they like on hostile bytes
        raise SampleError("depth_corrupt", got=error) from None
