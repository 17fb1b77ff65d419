"""Pixels of any size to the square an image tower is fed, for training and for evaluation.

A transform first *plans* from the displayed size alone (which box, how large, flipped or not), so that the decoder can
skip what the plan does not need, and then *renders* the decoded pixels. Crop and resize are one antialiased bicubic
pass over uint8: torch's vectorised port of Pillow's kernel, equal to it within one grey level at about a fifth of the
time (Pillow 13 resizes the rows of a tall image first, so there the clipped overshoot may fall elsewhere). No mean, no
standard deviation: images travel as uint8 and the tower normalises.

Randomness comes only from a Philox generator keyed by (seed, epoch, uid, stage), and only through its uniform doubles:
the same sample in the same epoch has the same pixels on any worker of any rank after any restart.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import interpolate

from vlm_train.errors import ConfigError
from vlm_train.types import ImageSpec

_NUM_ATTEMPTS = 10
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def keyed_generator(seed: int, epoch: int, uid: bytes, stage: str) -> np.random.Generator:
    """A generator that depends on its four arguments and on nothing else. Use only `.random()`: that much is fixed."""
    words = struct.pack("<qq", seed, epoch) + uid + stage.encode()
    key = np.frombuffer(hashlib.blake2b(words, digest_size=16).digest(), "<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do with one image of `width` x `height` pixels (as displayed).

    `box` (left, top, width, height) is cut out and resized to `resized` (width, height); the centre square of `size`
    is kept. `colours`: factors for brightness, contrast, saturation; None leaves the colours alone.
    """

    width: int
    height: int
    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    size: int
    flip: bool = False
    colours: tuple[float, float, float] | None = None

    @property
    def min_decoded(self) -> tuple[int, int]:
        """The smallest (width, height) of the decoded image at which `box` still need not be enlarged."""
        _, _, box_width, box_height = self.box
        return (
            math.ceil(self.width * min(1.0, self.resized[0] / box_width)),
            math.ceil(self.height * min(1.0, self.resized[1] / box_height)),
        )


class Transform(Protocol):
    """Chooses what to do with an image from its displayed size; `render` does it."""

    size: int  # S, side of the square in pixels

    def plan(self, width: int, height: int, generator: np.random.Generator) -> Plan:
        """What to do with an image of `width` x `height` pixels."""


class TrainTransform:
    """Random resized crop, and where asked a horizontal flip, colour jitter and grey.

    The crop follows torchvision's definition of RandomResizedCrop: an area share from `scale`, an aspect from `ratio`
    (uniform in its logarithm), ten attempts, then the largest centred box within `ratio`.

    Args:
        spec: what the image tower wants; its `size` is used.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height of the box.
        flip: probability of mirroring left and right; wrong for captions that say "left".
        color_jitter: brightness, contrast and saturation are each multiplied by a factor in [1 - c, 1 + c].
        grayscale: probability of taking the colours away; wrong for captions that name colours.

    Raises:
        ConfigError: a range that is empty or out of bounds.
    """

    def __init__(
        self,
        *,
        spec: ImageSpec,
        scale: Sequence[float] = (0.9, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
    ) -> None:
        _check_range("scale", scale, 1.0)
        _check_range("ratio", ratio, math.inf)
        for name, value in (("flip", flip), ("color_jitter", color_jitter), ("grayscale", grayscale)):
            if not 0 <= value <= 1:
                raise ConfigError(f"transform: `{name}` is out of range", got=value, allowed="0 to 1")
        self.scale, self.ratio = (scale[0], scale[1]), (ratio[0], ratio[1])
        self.size, self.flip, self.color_jitter, self.grayscale = spec.size, flip, color_jitter, grayscale

    def plan(self, width: int, height: int, generator: np.random.Generator) -> Plan:
        """Draws the box, the flip and the colours, always in that order."""
        box = self._box(width, height, generator)
        flip = generator.random() < self.flip
        factors = 1 + self.color_jitter * (2 * generator.random(3) - 1)
        gray = generator.random() < self.grayscale
        colours = (float(factors[0]), float(factors[1]), 0.0 if gray else float(factors[2]))
        changed = gray or self.color_jitter > 0
        return Plan(
            width=width,
            height=height,
            box=box,
            resized=(self.size, self.size),
            size=self.size,
            flip=bool(flip),
            colours=colours if changed else None,
        )

    def _box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_NUM_ATTEMPTS):
            area = width * height * _between(*self.scale, generator)
            aspect = math.exp(_between(low, high, generator))
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                left = int(generator.random() * (width - box_width + 1))
                top = int(generator.random() * (height - box_height + 1))
                return left, top, box_width, box_height
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        box_width = max(1, min(width, round(height * aspect)))
        box_height = max(1, min(height, round(width / aspect)))
        return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


class EvalTransform:
    """No randomness; the arithmetic is torchvision's Resize and CenterCrop.

    Args:
        spec: what the image tower wants. `resize: shortest` brings the short side to the size and keeps the centre
            square, `squash` brings both sides to the size.
    """

    def __init__(self, *, spec: ImageSpec) -> None:
        self.size, self.resize = spec.size, spec.resize

    def plan(self, width: int, height: int, generator: np.random.Generator) -> Plan:
        """The whole image; `generator` is not used."""
        resized = (self.size, self.size)
        if self.resize == "shortest":
            short = min(width, height)
            resized = (int(self.size * width / short), int(self.size * height / short))
        return Plan(width=width, height=height, box=(0, 0, width, height), resized=resized, size=self.size)


def render(pixels: np.ndarray, plan: Plan) -> np.ndarray:
    """Decoded pixels uint8 [H, W, 3], at any scale of the planned image, to uint8 [S, S, 3]."""
    left, right = _edges(plan.box[0], plan.box[2], plan.width, pixels.shape[1])
    top, bottom = _edges(plan.box[1], plan.box[3], plan.height, pixels.shape[0])
    image = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    width, height = plan.resized
    if image.shape[2:] != (height, width):
        image = interpolate(image, (height, width), mode="bicubic", antialias=True)
    x, y = round((width - plan.size) / 2), round((height - plan.size) / 2)
    square = image[0, :, y : y + plan.size, x : x + plan.size].permute(1, 2, 0).numpy()
    square = square[:, ::-1] if plan.flip else square
    return square if plan.colours is None else _recolour(square, plan.colours)


def _edges(start: int, length: int, planned: int, decoded: int) -> tuple[int, int]:
    """The planned interval in decoded pixels, at least one long."""
    first = min(round(start * decoded / planned), decoded - 1)
    return first, max(first + 1, round((start + length) * decoded / planned))


def _recolour(image: np.ndarray, factors: tuple[float, float, float]) -> np.ndarray:
    """Brightness, contrast (about the mean grey), saturation (about each pixel's grey), as torchvision defines them."""
    brightness, contrast, saturation = (np.float32(factor) for factor in factors)
    values = np.clip(image.astype(np.float32) * brightness, 0, 255)
    mean = (values @ _LUMA).mean(dtype=np.float32)
    values = np.clip(mean + (values - mean) * contrast, 0, 255)
    grey = (values @ _LUMA)[..., None]
    return np.rint(np.clip(grey + (values - grey) * saturation, 0, 255)).astype(np.uint8)


def _between(low: float, high: float, generator: np.random.Generator) -> float:
    return low + (high - low) * generator.random()


def _check_range(name: str, bounds: Sequence[float], limit: float) -> None:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= limit:
        allowed = f"[low, high] with 0 < low <= high <= {limit}"
        raise ConfigError(f"transform: `{name}` is not a range", got=list(bounds), allowed=allowed)
