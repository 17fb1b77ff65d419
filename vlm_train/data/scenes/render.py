"""Draws a scene and measures, from the drawing itself, which pixels of which object can be seen.

One map of object numbers is drawn at four times the size. Averaging it gives the share of every pixel that each object
covers; the image is the mix of the colours by these shares (anti-aliased), and the mask of an object is where its share
is at least one half. Image, masks and boxes therefore cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vlm_train.data.scenes.world import COLORS, Scene, SceneObject

SCALE = 4
Point = tuple[float, float]


def _ring_of_points(num: int, radius: float = 1.0, turn: float = 0.0) -> list[Point]:
    angles = [2 * math.pi * index / num + turn for index in range(num)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star() -> list[Point]:
    outer, inner = _ring_of_points(5), _ring_of_points(5, 0.42, math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> list[Point]:
    angles = [2 * math.pi * index / 40 for index in range(40)]
    return [
        (
            math.sin(angle) ** 3,
            -(13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)) / 16
            - 0.1,
        )
        for angle in angles
    ]


_ARM = 0.34
POLYGONS: dict[str, list[Point]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star(),
    "hexagon": _ring_of_points(6),
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "cross": [
        *[(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
    ],
    "heart": _heart(),
}
"""Outlines in a circle of radius 1 around the centre, y downwards; circle and ring are drawn as ellipses."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """`image` uint8 [S, S, 3]; `masks` bool [N, S, S], the visible pixels of each object."""

    image: np.ndarray
    masks: np.ndarray


def render(scene: Scene) -> Rendering:
    """Draws the scene."""
    side = scene.side
    numbers = Image.new("L", (side * SCALE, side * SCALE))
    draw = ImageDraw.Draw(numbers)
    for number, item in enumerate(scene.objects, start=1):
        _draw(draw, item, number)
    fine = np.asarray(numbers)
    ground = background(scene).astype(np.int32)
    image = ground * SCALE**2
    masks = np.zeros((len(scene.objects), side, side), dtype=bool)
    for number, item in enumerate(scene.objects, start=1):
        left, top, right, bottom = _window(item, side)
        part = fine[top * SCALE : bottom * SCALE, left * SCALE : right * SCALE] == number
        rows = part.reshape(bottom - top, SCALE, -1).sum(axis=1, dtype=np.uint8)
        share = rows.reshape(bottom - top, right - left, SCALE).sum(axis=2, dtype=np.int32)
        color = np.array(COLORS[item.color], dtype=np.int32)
        image[top:bottom, left:right] += share[:, :, None] * (color - ground[top:bottom, left:right])
        masks[number - 1, top:bottom, left:right] = share * 2 >= SCALE**2
    return Rendering(((image + SCALE**2 // 2) // SCALE**2).astype(np.uint8), masks)


def box_of(mask: np.ndarray) -> list[int]:
    """[x0, y0, x1, y1] in pixels, the last row and column exclusive: the tightest box around the true pixels."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def background(scene: Scene) -> np.ndarray:
    """The scene without its objects, uint8 [S, S, 3]: a mix of the two light tones."""
    side = scene.side
    rows, columns = np.mgrid[0:side, 0:side] * 8 // side
    match scene.background:
        case "plain":
            mix = np.zeros((side, side))
        case "gradient":
            mix = np.repeat(np.linspace(0, 1, side)[:, None], side, axis=1)
        case "stripes":
            mix = columns % 2
        case "checker":
            mix = (rows + columns) % 2
        case _:
            mix = np.random.Generator(np.random.Philox(scene.texture_seed)).random((side, side))
    light, dark = (np.array(tone, dtype=np.float64) for tone in scene.tones)
    return np.rint(light + mix[:, :, None] * (dark - light)).astype(np.uint8)


def _window(item: SceneObject, side: int) -> tuple[int, int, int, int]:
    reach = item.radius + 1.5
    left, top = max(0, math.floor(item.x - reach)), max(0, math.floor(item.y - reach))
    return left, top, min(side, math.ceil(item.x + reach)), min(side, math.ceil(item.y + reach))


def _draw(draw: ImageDraw.ImageDraw, item: SceneObject, number: int) -> None:
    x, y, radius = item.x * SCALE, item.y * SCALE, item.radius * SCALE
    extent = (x - radius, y - radius, x + radius, y + radius)
    if item.shape == "circle":
        draw.ellipse(extent, fill=number)
    elif item.shape == "ring":
        draw.ellipse(extent, outline=number, width=round(radius * 0.42))
    else:
        draw.polygon([(x + u * radius, y + v * radius) for u, v in POLYGONS[item.shape]], fill=number)
