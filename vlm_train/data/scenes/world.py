"""What a scene is and how one is drawn from chance: objects on a jittered 3 x 3 grid.

Within a scene no two objects share both colour and shape, so "the red circle" names one object, while several objects
may share a colour or a shape, so there is something to count. Each object has a grid cell of its own, which keeps
overlap to about a pixel without rejection: any seed gives a scene at once.

The number of objects is 1, 2, 3, 4, 5 with odds 1:2:2:2:1. That is the law under which a false count one off the true
one (see `language.count_contrast`) has the same distribution as the true one, so that the text alone tells nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "hexagon", "diamond", "cross", "ring", "heart")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "orange": (245, 125, 20),
    "yellow": (250, 220, 45),
    "green": (40, 155, 60),
    "cyan": (60, 205, 220),
    "blue": (40, 75, 210),
    "purple": (135, 50, 175),
    "pink": (245, 140, 190),
    "brown": (125, 75, 40),
    "black": (20, 20, 20),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.09, 0.11), "large": (0.15, 0.165)}
"""Range of the radius, as a share of the side of the image."""
BACKGROUNDS = ("plain", "gradient", "stripes", "checker", "speckle")
COUNT_ODDS = {1: 1, 2: 2, 3: 2, 4: 2, 5: 1}
SHARE_SHAPE, SHARE_COLOR = 0.35, 0.25
"""How often a further object takes the shape, or else the colour, of the first."""
GRID = 3
OVERLAP = 0.012
"""How far an object may leave its cell, as a share of the side."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object; `x`, `y` (centre) and `radius` in pixels, y downwards."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in drawing order (later ones lie on top) before a light background with two tones."""

    side: int
    background: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    texture_seed: int
    objects: tuple[SceneObject, ...]


def sample_scene(rng: random.Random, side: int) -> Scene:
    """A scene of `side` x `side` pixels, a pure function of the state of `rng`."""
    num_objects = rng.choices(list(COUNT_ODDS), weights=list(COUNT_ODDS.values()))[0]
    kinds: list[tuple[str, str]] = []
    while len(kinds) < num_objects:
        kind = _sample_kind(rng, kinds)
        if kind not in kinds:
            kinds.append(kind)
    cells = rng.sample(range(GRID * GRID), num_objects)
    objects = [_place(rng, shape, color, cell, side) for (shape, color), cell in zip(kinds, cells, strict=True)]
    light = (rng.randint(222, 250), rng.randint(222, 250), rng.randint(222, 250))
    step = rng.randint(8, 20)
    dark = (light[0] - step, light[1] - step, light[2] - step)
    return Scene(side, rng.choice(BACKGROUNDS), (light, dark), rng.getrandbits(32), tuple(objects))


def _sample_kind(rng: random.Random, kinds: list[tuple[str, str]]) -> tuple[str, str]:
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    chance = rng.random()
    if kinds and chance < SHARE_SHAPE:
        shape = kinds[0][0]
    elif kinds and chance < SHARE_SHAPE + SHARE_COLOR:
        color = kinds[0][1]
    return shape, color


def _place(rng: random.Random, shape: str, color: str, cell: int, side: int) -> SceneObject:
    size = rng.choice(list(SIZES))
    radius = rng.uniform(*SIZES[size])
    row, column = divmod(cell, GRID)
    slack = 0.5 / GRID - radius + OVERLAP
    x, y = ((index + 0.5) / GRID + rng.uniform(-slack, slack) for index in (column, row))
    x, y = (min(max(value, radius), 1 - radius) for value in (x, y))
    return SceneObject(shape, color, size, x * side, y * side, radius * side)
