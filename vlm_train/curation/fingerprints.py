"""What a picture looks like in a few bytes: hashes that copies of it share, and colours that tell others apart.

*pHash* (64 bits): the lowest 8 x 8 frequencies of the picture in grey at 32 x 32, each above their median or not; the
bits are those of the package ImageHash (Klinger and Starkweather's pHash with the median over all 64). *PDQ* (256
bits): the same of 16 x 16 frequencies, without the constant, of 64 x 64 (after the hash of that name of Meta's
ThreatExchange, from which it differs in how the picture is made small). Its *quality* says how much there is to hash:
flat pictures all look alike to both. *Colours*: the picture at 8 x 8 pixels; both hashes are blind to colour, and to
much that is small.

JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that is enough, in half the time. Of the 64 bits of ImageHash
it moves none in three pictures of four, two in nearly all others, four in one of a hundred (200 pictures of 256 to 512
pixels a side with as much detail as photographs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_train.data.decode import first_image, open_image

COLOUR_BYTES = 3 * 8 * 8

VERSION = "1"
"""Fingerprints of another version are made anew."""

_SIDE_HASH, _SIDE_PDQ, _SIDE_COLOURS = 32, 64, 8
_DECODED = 2 * _SIDE_PDQ  # a JPEG is decoded at no less


class Fingerprint(NamedTuple):
    """Of one picture. `phash` < 2^64, its first bit the lowest frequency; `pdq`: 32 bytes; `quality` 0..100 (Meta's
    advice is not to match below 50); `colours`: 192 bytes, RGB of 8 x 8 pixels."""

    phash: int
    pdq: bytes
    quality: int
    colours: bytes


def fingerprint(parts: Mapping[str, bytes]) -> Fingerprint:
    """Of the first image of a sample. Raises SampleError where it has none, or it does not decode."""
    opened = open_image(first_image(parts))
    return of_pixels(opened.decode(min_width=_DECODED, min_height=_DECODED))


def of_pixels(pixels: NDArray[np.uint8]) -> Fingerprint:
    """Of RGB [H, W, 3]."""
    image = Image.fromarray(pixels).convert("L")
    small = np.asarray(image.resize((_SIDE_HASH, _SIDE_HASH), Image.Resampling.LANCZOS), np.float64)
    bits = _above_median(_LOW_HASH @ small @ _LOW_HASH.T)
    middle = _shrunk(np.asarray(image, np.float32), _SIDE_PDQ).astype(np.float64)
    colours = _shrunk(pixels, _SIDE_COLOURS)
    return Fingerprint(
        phash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        pdq=np.packbits(_above_median(_LOW_PDQ @ middle @ _LOW_PDQ.T)).tobytes(),
        quality=_quality(middle),
        colours=colours.tobytes(),
    )


def _frequencies(side: int, first: int, stop: int) -> NDArray[np.float64]:
    """Rows `first` to `stop` of the cosine transform (DCT-II) of `side` values."""
    places = 2 * np.arange(side) + 1
    return np.cos(np.pi * np.arange(first, stop)[:, None] * places / (2 * side))


_LOW_HASH = _frequencies(_SIDE_HASH, 0, 8)
_LOW_PDQ = _frequencies(_SIDE_PDQ, 1, 17)


def _above_median(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (values > np.median(values)).reshape(-1)


def _shrunk(pixels: NDArray[Any], side: int) -> NDArray[Any]:
    """Means over equal areas, of the same type; a smaller picture is made larger."""
    way = cv2.INTER_AREA if min(pixels.shape[:2]) >= side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (side, side), interpolation=way))


def _quality(grey: NDArray[Any]) -> int:
    """PDQ's: the steps between neighbours, in hundredths of the range, over 90, and 100 at most."""
    steps = [np.abs(np.trunc(np.diff(grey, axis=axis) * (100 / 255))).sum() for axis in (0, 1)]
    return min(100, int(sum(steps) / 90))
