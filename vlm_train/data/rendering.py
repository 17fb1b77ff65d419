"""Carries out what a transform has planned: decoded pixels to the square, or the squares, that a tower is fed.

Evaluation keeps the arithmetic of torchvision's antialiased bicubic resize (torch's vectorised port of Pillow's kernel,
equal to it within one grey level; Pillow 13 resizes the rows of a tall image first, so there the clipped overshoot may
fall elsewhere). Training resizes with OpenCV's bilinear kernel. Where a side shrinks to less than half, the area mean
comes first: two taps would skip pixels. Over crops of 256-512 px pictures to 224, against evaluation's bicubic and in
grey levels: bilinear 0.61 in 157 us, area mean 0.51 in 715 us, torchvision's antialiased bilinear 0.61 in 449 us,
antialiased bicubic 0 in 553 us. It is integer arithmetic, without the vendor library that OpenCV calls on some
processors for other kernels, so it gives the same bits on all of them.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from vlm_train.data.transforms import Plan

_MAX_FRAMED = 1 << 26  # pixels of an image with its borders, as `decode.MAX_PIXELS`

cv2.setNumThreads(0)  # a worker has one thread, and OpenCV's pool does not survive a fork


def render(pixels: np.ndarray, plan: Plan, out: np.ndarray | None = None) -> np.ndarray:
    """Decoded pixels uint8 [H, W, 3], at any scale of the planned image, to uint8 [S, S, 3], all of the plan but its
    colours. `out`: where to write them, contiguous; it is returned."""
    square = np.empty((plan.size, plan.size, 3), np.uint8) if out is None else out
    if plan.exact:
        square[...] = _centre(resized(pixels, plan), plan)
    else:
        _bilinear(_cut(pixels, plan), plan, square)
    return cv2.flip(square, 1, dst=square) if plan.flip else square


def render_plane(values: np.ndarray, plan: Plan) -> np.ndarray:
    """One float32 value for each pixel, [H, W] at any scale of the planned image, to [S, S] where `render` puts the
    pixels: linear between values, the mean of many where the plan shrinks."""
    box, (width, height) = _cut(values, plan), plan.resized
    shrinks = box.shape[1] > width or box.shape[0] > height
    square = _centre(cv2.resize(box, plan.resized, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), plan)
    return np.ascontiguousarray(square[:, ::-1] if plan.flip else square)


def resized(pixels: np.ndarray, plan: Plan) -> np.ndarray:
    """Decoded pixels uint8 [H, W, 3] as `render` reads them to the whole of `plan.resized`, uint8 [height, width, 3],
    by torchvision's Resize."""
    if plan.box[2] * plan.box[3] * pixels.shape[0] * pixels.shape[1] > _MAX_FRAMED * plan.width * plan.height:
        return _framed_small(pixels, plan)
    return _bicubic(_cut(pixels, plan), *plan.resized)


def _bicubic(box: np.ndarray, width: int, height: int) -> np.ndarray:
    image = torch.from_numpy(box if box.flags.writeable else box.copy()).permute(2, 0, 1)[None]
    if image.shape[2:] != (height, width):
        image = interpolate(image, (height, width), mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).numpy()


def _framed_small(pixels: np.ndarray, plan: Plan) -> np.ndarray:
    """A long thin image, whose borders would take gigabytes, gets them when it is small."""
    left, top, full_width, full_height = plan.box
    shares = plan.resized[0] / full_width, plan.resized[1] / full_height
    width, height = max(1, round(plan.width * shares[0])), max(1, round(plan.height * shares[1]))
    x, y = (min(round(-start * share), full - length) for start, share, full, length in zip(
        (left, top), shares, plan.resized, (width, height), strict=True))  # fmt: skip
    canvas = np.full((plan.resized[1], plan.resized[0], 3), plan.border, np.uint8)
    canvas[y : y + height, x : x + width] = _bicubic(pixels, width, height)
    return canvas


def _centre(image: np.ndarray, plan: Plan) -> np.ndarray:
    """torchvision's CenterCrop."""
    x, y = round((plan.resized[0] - plan.size) / 2), round((plan.resized[1] - plan.size) / 2)
    return image[y : y + plan.size, x : x + plan.size]


def _cut(values: np.ndarray, plan: Plan) -> np.ndarray:
    """The planned box of decoded values [H, W, ...], with borders where it reaches beyond them."""
    left, right = _edges(plan.box[0], plan.box[2], plan.width, values.shape[1])
    top, bottom = _edges(plan.box[1], plan.box[3], plan.height, values.shape[0])
    inside = values[max(top, 0) : bottom, max(left, 0) : right]
    height, width = inside.shape[:2]
    if (height, width) == (bottom - top, right - left):
        return inside
    framed = np.empty((bottom - top, right - left, *values.shape[2:]), values.dtype)
    framed[...] = plan.border if values.ndim == 3 else 0
    framed[max(-top, 0) :, max(-left, 0) :][:height, :width] = inside
    return framed


def _bilinear(box: np.ndarray, plan: Plan, out: np.ndarray) -> None:
    height, width, _ = box.shape
    if max(width, height) > 2 * plan.size:
        shrunk = (min(width, plan.size), min(height, plan.size))
        box = cv2.resize(box, shrunk, interpolation=cv2.INTER_AREA)
    cv2.resize(box, (plan.size, plan.size), dst=out, interpolation=cv2.INTER_LINEAR)


def _edges(start: int, length: int, planned: int, decoded: int) -> tuple[int, int]:
    """The planned interval in decoded pixels, at least one long."""
    first = min(round(start * decoded / planned), decoded - 1)
    return first, max(first + 1, round((start + length) * decoded / planned))
