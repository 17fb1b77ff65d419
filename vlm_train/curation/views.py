"""A small picture that can be moved by parts of a cell, and codes of what is seen in it through several windows.

A *thumbnail* is `THUMBNAIL_BYTES` bytes: brightness [32, 32], then both colour differences [16, 16], 128 for none. It
is smoothed by a bell of 0.6 cells, so that where an edge lies within a cell is told by the cells beside it.

A *code* has 256 bits: of the lowest frequencies of a window (4 x 4 of brightness, without the constant, and 3 x 3 of
each colour difference, all weighted by their frequency) the signs of 256 fixed random sums (Charikar, Similarity
Estimation Techniques from Rounding Algorithms, STOC 2002). Sums over all frequencies turn with the angle between two
pictures, where signs of single frequencies, of which drawings have many that are all but 0, turn with any change.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SIDE, COLOUR_SIDE = 32, 16
THUMBNAIL_BYTES = SIDE * SIDE + 2 * COLOUR_SIDE * COLOUR_SIDE

_CUT = 0.025
"""Of each side of the middle: half of what a cropped copy may lack."""
_THIRDS, _QUARTERS = ([(i / num, (i + 1) / num) for i in range(num)] for num in (3, 4))
_SPANS = ((0.0, 1.0), (_CUT, 1 - _CUT), *_THIRDS, *_QUARTERS)  # of a side
VIEWS = (
    (0, 0),
    (1, 1),
    *((down, across) for down in (2, 3, 4) for across in (2, 3, 4)),
    *((strip, 0) for strip in (5, 6, 7, 8)),
    *((0, strip) for strip in (5, 6, 7, 8)),
)
"""(span of the height, span of the width): the whole, its middle, nine tiles, four strips across, four down."""
WHOLE, MIDDLE, PARTS = 0, 1, range(2, len(VIEWS))

BITS = 256
CODES_BYTES = len(VIEWS) * BITS // 8

_LEAST_DETAIL = 0.3
"""Grey levels of the frequencies of a view together; what has less is flat, and its code is 0. Rounding a thumbnail
gives a part of it up to 0.16."""
_BELL = 0.6  # cells
_FREQUENCIES, _COLOUR_FREQUENCIES = 4, 3


def thumbnail(channels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Of brightness and colour differences [3, S, S], S a multiple of 32: uint8 [THUMBNAIL_BYTES]."""
    side = channels.shape[1]
    bell, colour_bell = _bell(side, SIDE), _bell(side, COLOUR_SIDE)
    grey = bell @ channels[0] @ bell.T
    colours = colour_bell @ channels[1:] @ colour_bell.T + 128
    return np.clip(np.rint(np.concatenate([grey.ravel(), colours.ravel()])), 0, 255).astype(np.uint8)


def planes(thumbnails: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(brightness [n, 32, 32], colour differences [n, 2, 16, 16]) of thumbnails [n, THUMBNAIL_BYTES]."""
    values = thumbnails.astype(np.float64)
    grey = values[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)
    return grey, values[:, SIDE * SIDE :].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE)


def codes(one: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of the views of a thumbnail [THUMBNAIL_BYTES]: uint8 [8, 32]."""
    (grey,), (colours,) = planes(one[None])
    many, few, num = _FREQUENCIES, _COLOUR_FREQUENCIES, len(_SPANS)
    # of all pairs of spans at once: [span, frequency, span, frequency]
    greys = (_GREY @ (grey - 128) @ _GREY.T).reshape(num, many, num, many)
    tints = (_TINT @ (colours - 128) @ _TINT.T).reshape(2, num, few, num, few)
    seen = np.concatenate([
        greys[_DOWN, :, _ACROSS].reshape(len(VIEWS), -1),
        *(each[_DOWN, :, _ACROSS].reshape(len(VIEWS), -1) for each in tints),
    ], axis=1)  # fmt: skip
    varied = seen * _VARIES
    bits = np.packbits((seen * _WEIGHTS) @ _SUMS.T > 0, axis=1)
    return bits * ((varied**2).sum(axis=1, keepdims=True) >= _LEAST_DETAIL**2)


@lru_cache(maxsize=8)
def _bell(side: int, cells: int) -> NDArray[np.float64]:
    """[cells, side]: means of `side` values under a bell around each cell."""
    width = side / cells
    apart = (np.arange(side) + 0.5)[None] - (np.arange(cells) + 0.5)[:, None] * width
    bell = np.exp(-0.5 * (apart / (_BELL * width)) ** 2)
    return np.asarray(bell / bell.sum(axis=1, keepdims=True))


def _cosines(span: tuple[float, float], num: int, side: int) -> NDArray[np.float64]:
    """The lowest `num` frequencies of a span of a side of `side` cells, in the units of a cell: [num, side]."""
    edges = np.clip((np.arange(side + 1) / side - span[0]) / (span[1] - span[0]), 0, 1)
    waves = [np.sqrt(2) * np.sin(np.pi * number * edges) / (np.pi * number) for number in range(1, num)]
    return np.diff(np.stack([edges, *waves]), axis=1)


def _weights() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(weight of each frequency of a view, 1 for those that are no constant and else 0): [34]."""
    weights, varies = [], []
    for num, constant in ((_FREQUENCIES, 0.0), *[(_COLOUR_FREQUENCIES, 1.0)] * 2):
        frequency = np.hypot(*np.meshgrid(np.arange(num), np.arange(num), indexing="ij")).ravel()
        weights.append(np.where(frequency > 0, frequency, constant))
        varies.append((frequency > 0).astype(np.float64))
    return np.concatenate(weights), np.concatenate(varies)


_GREY = np.concatenate([_cosines(span, _FREQUENCIES, SIDE) for span in _SPANS])
_TINT = np.concatenate([_cosines(span, _COLOUR_FREQUENCIES, COLOUR_SIDE) for span in _SPANS])
_WEIGHTS, _VARIES = _weights()
_DOWN, _ACROSS = np.array(VIEWS).T
_SUMS = np.random.default_rng(0).standard_normal((BITS, len(_WEIGHTS)))
