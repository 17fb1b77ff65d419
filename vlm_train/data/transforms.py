"""Pixels of any size to the square an image tower is fed, for training and for evaluation.

A transform first *plans* from the displayed size alone (which box, how large, flipped or not), so that the decoder can
skip what the plan does not need, and then `rendering.render` carries the plan out. No mean, no
standard deviation: images travel as uint8 and the tower normalises.

Randomness is a hash of (seed, visit, uid, stage), a visit being the position in the stream: the same sample at the same
position has the same pixels on any worker of any rank after any restart.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vlm_train.errors import ConfigError
from vlm_train.types import WHOLE, Grid, ImageSpec

_NUM_ATTEMPTS = 10
_BLOCK_WORDS = 8  # 64-bit words in a BLAKE2b digest


class Uniforms(Protocol):
    """Where random numbers come from."""

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""


class _KeyedUniforms:
    """The doubles of BLAKE2b in counter mode: a function of the key and of how many were taken, and of nothing else.

    A NumPy Philox generator costs 41 us to make, a twentieth of a whole sample; this costs 2 us, and no release of any
    library can change it.
    """

    def __init__(self, seed: int, visit: int, uid: bytes, stage: str) -> None:
        self._key = struct.pack("<qq16s", seed, visit, uid) + stage.encode()
        self._block = 0
        self._words: list[int] = []

    def random(self) -> float:
        """The next number: the 53 high bits of the next word."""
        if not self._words:
            digest = hashlib.blake2b(struct.pack("<Q", self._block) + self._key).digest()
            self._words = list(reversed(struct.unpack(f"<{_BLOCK_WORDS}Q", digest)))
            self._block += 1
        return (self._words.pop() >> 11) * 2.0**-53


def keyed_generator(seed: int, visit: int, uid: bytes, stage: str) -> Uniforms:
    """A generator that depends on its four arguments and on nothing else."""
    return _KeyedUniforms(seed, visit, uid, stage)


def keyed_draw(seed: int, visit: int, uid: bytes) -> int:
    """A number of 53 bits for the randomness of a model on this sample (`types.BatchRows.draws`)."""
    return int(keyed_generator(seed, visit, uid, "model").random() * 2.0**53)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do with one image of `width` x `height` pixels (as displayed).

    `box` (left, top, width, height) is cut out and resized to `resized` (width, height); the centre square of `size`
    is kept. `colours`: factors for brightness, contrast, saturation (`imaging.recolour`); None leaves the colours
    alone. `exact`: evaluation's arithmetic; else training's, which is several times as fast. `border`: the colour of
    what lies outside of the image, where `box` reaches beyond it.
    """

    width: int
    height: int
    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    size: int
    exact: bool = False
    flip: bool = False
    colours: tuple[float, float, float] | None = None
    border: tuple[int, int, int] = (0, 0, 0)

    @property
    def min_decoded(self) -> tuple[int, int]:
        """The smallest (width, height) of the decoded image at which `box` still need not be enlarged."""
        _, _, box_width, box_height = self.box
        return (
            math.ceil(self.width * min(1.0, self.resized[0] / box_width)),
            math.ceil(self.height * min(1.0, self.resized[1] / box_height)),
        )


class Transform(Protocol):
    """Chooses what to do with an image from its displayed size; `rendering.render` does it."""

    size: int  # S, side of the square in pixels
    recolours: bool  # whether plans may have `colours`

    @property
    def whole(self) -> EvalTransform | None:
        """How it lays out whole images; None where it takes parts of them."""

    def plan(self, width: int, height: int, generator: Uniforms) -> Plan:
        """What to do with an image of `width` x `height` pixels."""


class TrainTransform:
    """Random resized crop, or the whole image as in evaluation, and where asked a flip, colour jitter and grey.

    The crop follows torchvision's definition of RandomResizedCrop: an area share from `scale`, an aspect from `ratio`
    (uniform in its logarithm), ten attempts, then the largest centred box within `ratio`.

    Args:
        spec: what the image tower wants; its `size` is used.
        scale: smallest and largest share of the image's area; None is the whole image, laid out as in evaluation.
        ratio: smallest and largest width / height of the box; not used without a crop.
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
        scale: Sequence[float] | None = (0.9, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
    ) -> None:
        if scale is not None:
            _check_range("scale", scale, 1.0)
        _check_range("ratio", ratio, math.inf)
        for name, value in (("flip", flip), ("color_jitter", color_jitter), ("grayscale", grayscale)):
            if not 0 <= value <= 1:
                raise ConfigError(f"transform: `{name}` is out of range", got=value, allowed="0 to 1")
        self.scale, self.ratio = None if scale is None else (scale[0], scale[1]), (ratio[0], ratio[1])
        self.whole = EvalTransform(spec=spec) if scale is None else None
        self.size, self.flip, self.color_jitter, self.grayscale = spec.size, flip, color_jitter, grayscale
        self.recolours = color_jitter > 0 or grayscale > 0

    def plan(self, width: int, height: int, generator: Uniforms) -> Plan:
        """Draws the box, the flip and the colours, always in that order."""
        if self.whole is not None:
            plan = self.whole.plan(width, height, generator)
        else:
            box, resized = self._box(width, height, generator), (self.size, self.size)
            plan = Plan(width=width, height=height, box=box, resized=resized, size=self.size)
        flip = generator.random() < self.flip
        return replace(plan, flip=flip, colours=self._colours(generator) if self.recolours else None)

    def _colours(self, generator: Uniforms) -> tuple[float, float, float]:
        low, high = 1 - self.color_jitter, 1 + self.color_jitter
        brightness, contrast, saturation = (_between(low, high, generator) for _ in range(3))
        return brightness, contrast, 0.0 if generator.random() < self.grayscale else saturation

    def _box(self, width: int, height: int, generator: Uniforms) -> tuple[int, int, int, int]:
        assert self.scale is not None
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
            square, `squash` brings both sides to the size, `pad` does so behind borders of the mean colour that make
            the image square (`expand2square` of LLaVA-1.5).
    """

    def __init__(self, *, spec: ImageSpec) -> None:
        self.size, self.resize, self.recolours = spec.size, spec.resize, False
        red, green, blue = (int(255 * mean) for mean in spec.mean)
        self.border = (red, green, blue)

    @property
    def whole(self) -> EvalTransform:
        """Itself."""
        return self

    def plan(self, width: int, height: int, generator: Uniforms) -> Plan:
        """The whole image; `generator` is not used."""
        plan = self.on_grid(width, height, WHOLE)
        if self.resize != "shortest":
            return plan
        short = min(width, height)
        return replace(plan, resized=(int(self.size * width / short), int(self.size * height / short)))

    def on_grid(self, width: int, height: int, grid: Grid) -> Plan:
        """The whole image on a grid of squares, for `rendering.resized`: behind borders where `resize` is pad, else
        squashed. Where the grid is a map it is as large as the grid allows, and the borders are for `data.tiles`."""
        box, (right, bottom) = (0, 0, width, height), (grid.columns * self.size, grid.rows * self.size)
        if grid.is_map:
            right, bottom = min(right, -(-width * bottom // height)), min(bottom, -(-height * right // width))
        elif self.resize == "pad":
            full_width = max(width, -(-height * grid.columns // grid.rows))
            full_height = max(height, -(-width * grid.rows // grid.columns))
            box = (-((full_width - width) // 2), -((full_height - height) // 2), full_width, full_height)
        return Plan(
            width=width,
            height=height,
            box=box,
            resized=(right, bottom),
            size=self.size,
            exact=True,
            border=self.border,
        )


def _between(low: float, high: float, generator: Uniforms) -> float:
    return low + (high - low) * generator.random()


def _check_range(name: str, bounds: Sequence[float], limit: float) -> None:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= limit:
        allowed = f"[low, high] with 0 < low <= high <= {limit}"
        raise ConfigError(f"transform: `{name}` is not a range", got=list(bounds), allowed=allowed)
