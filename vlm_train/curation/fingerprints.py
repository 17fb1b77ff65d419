"""What a picture looks like in few bytes: hashes that find its copies, and a small picture that tells others apart.

*pHash* (64 bits): the lowest 8 x 8 frequencies of the picture in grey at 32 x 32, each above their median or not; the
bits are those of the package ImageHash (Klinger and Starkweather's pHash with the median over all 64). *Thumbnail*:
brightness at 32 x 32 and both colour differences at 16 x 16, smoothed so that it can be moved by parts of a cell.
*Views*: a code of 256 bits for each of `views.VIEWS`, the whole, its middle and its parts, out of the thumbnail.
*Quality* says how much there is to hash: flat pictures all look alike. It is that of PDQ (Meta's ThreatExchange).

JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that is enough, in half the time. Of the 64 bits of ImageHash
it moves none in three pictures of four, two in nearly all others, four in one of a hundred (200 pictures of 256 to 512
pixels a side with as much detail as photographs).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_train.curation import views
from vlm_train.data.decode import first_image, open_image

VERSION = "3"
"""Fingerprints of another version are made anew."""

_SIDE_HASH, _SIDE_QUALITY = 32, 64
_DECODED = 2 * _SIDE_QUALITY  # a JPEG is decoded at no less


class Fingerprint(NamedTuple):
    """Of one picture. `phash` < 2^64, its first bit the lowest frequency; `quality` 0..100 (Meta's advice is not to
    match below 50); `thumbnail`: `views.THUMBNAIL_BYTES`; `thumbnail_hash` < 2^64: of these; `views`:
    `views.CODES_BYTES`."""

    phash: int
    quality: int
    thumbnail: bytes
    thumbnail_hash: int
    views: bytes


def fingerprint(parts: Mapping[str, bytes]) -> Fingerprint:
    """Of the first image of a sample. Raises SampleError where it has none, or it does not decode."""
    opened = open_image(first_image(parts))
    return of_pixels(opened.decode(min_width=_DECODED, min_height=_DECODED))


def of_pixels(pixels: NDArray[np.uint8]) -> Fingerprint:
    """Of RGB [H, W, 3]."""
    image = Image.fromarray(pixels).convert("L")
    small = np.asarray(image.resize((_SIDE_HASH, _SIDE_HASH), Image.Resampling.LANCZOS), np.float64)
    frequencies = _LOW_HASH @ small @ _LOW_HASH.T
    bits = (frequencies > np.median(frequencies)).reshape(-1)
    channels = _channels(_shrunk(pixels, _SIDE_QUALITY))
    thumbnail = views.thumbnail(channels)
    return Fingerprint(
        phash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        quality=_quality(channels[0]),
        thumbnail=thumbnail.tobytes(),
        thumbnail_hash=int.from_bytes(hashlib.blake2b(thumbnail.tobytes(), digest_size=8).digest(), "big"),
        views=views.codes(thumbnail).tobytes(),
    )


def _frequencies(side: int, first: int, stop: int) -> NDArray[np.float64]:
    """Rows `first` to `stop` of the cosine transform (DCT-II) of `side` values."""
    places = 2 * np.arange(side) + 1
    return np.cos(np.pi * np.arange(first, stop)[:, None] * places / (2 * side))


_LOW_HASH = _frequencies(_SIDE_HASH, 0, 8)


def _shrunk(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Means over equal areas; a smaller picture is made larger."""
    way = cv2.INTER_AREA if min(pixels.shape[:2]) >= side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (side, side), interpolation=way))


def _channels(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """RGB [S, S, 3] as brightness 0..255 and the differences of blue and of red from it, -128..128: [3, S, S]."""
    red, green, blue = np.moveaxis(pixels.astype(np.float64), 2, 0)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([grey, 0.564 * (blue - grey), 0.713 * (red - grey)])


def _quality(grey: NDArray[Any]) -> int:
    """PDQ's: the steps between neighbours, in hundredths of the range, over 90, and 100 at most."""
    steps = [np.abs(np.trunc(np.diff(grey, axis=axis) * (100 / 255))).sum() for axis in (0, 1)]
    return min(100, int(sum(steps) / 90))
