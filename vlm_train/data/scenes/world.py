"""What a scene is and how one is drawn from chance: objects on a jittered 3 x 3 grid.

Within a scene no two objects share both colour and shape, so "the red circle" names one object, while several objects
may share a colour or a shape, so there is something to count. Each object has a grid cell of its own, which keeps
overlap to about a pixel without rejection: any seed gives a scene at once.

The number of objects is 1, 2, 3, 4, 5 with odds 1:2:2:2:1, the two ends half as likely as what lies between. That is
the law under which a false count one off the true one (see `language.count_contrast`) has the same distribution as the
true one, so that the text alone tells nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vlm_train.errors import ConfigError

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
SHARE_SHAPE, SHARE_COLOR = 0.35, 0.25
"""How often a further object takes the shape, or else the colour, of the first."""
GRID = 3
OVERLAP = 0.012
"""How far an object may leave its cell, as a share of the side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What there can be: the first `num_shapes` of `SHAPES`, the first `num_colors` of `COLORS`, and from `fewest` to
    `most` objects in a scene. A small world repeats itself, which a small model can learn."""

    num_shapes: int = len(SHAPES)
    num_colors: int = len(COLORS)
    fewest: int = 1
    most: int = 5

    @property
    def shapes(self) -> tuple[str, ...]:
        """Every shape."""
        return SHAPES[: self.num_shapes]

    @property
    def colors(self) -> tuple[str, ...]:
        """Every colour."""
        return tuple(COLORS)[: self.num_colors]

    @property
    def count_odds(self) -> dict[int, int]:
        """Number of objects to its odds."""
        return {num: 1 if num in (self.fewest, self.most) else 2 for num in range(self.fewest, self.most + 1)}


WHOLE = World()
MOST_OBJECTS = 5  # a sound has so many places


def check_world(world: World) -> None:
    """Refuses a world that holds fewer kinds than a scene has objects. Raises ConfigError."""
    in_range = 1 <= world.num_shapes <= len(SHAPES) and 1 <= world.num_colors <= len(COLORS)
    if not in_range or not 1 <= world.fewest <= world.most <= min(MOST_OBJECTS, world.num_shapes * world.num_colors):
        raise ConfigError(
            "there can be no such world of scenes",
            got=f"{world.num_shapes} shapes, {world.num_colors} colors, {world.fewest} to {world.most} objects",
            allowed=f"1 to {len(SHAPES)} shapes, {len(COLORS)} colors, {MOST_OBJECTS} objects, each of its own kind",
            remedy="--num-objects 1-4 --num-shapes 3 --num-colors 6",
        )


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


def sample_scene(rng: random.Random, side: int, world: World = WHOLE) -> Scene:
    """A scene of `side` x `side` pixels, a pure function of the state of `rng`."""
    num_objects = rng.choices(list(world.count_odds), weights=list(world.count_odds.values()))[0]
    kinds: list[tuple[str, str]] = []
    while len(kinds) < num_objects:
        kind = _sample_kind(rng, kinds, world)
        if kind not in kinds:
            kinds.append(kind)
    cells = rng.sample(range(GRID * GRID), num_objects)
    objects = [_place(rng, shape, color, cell, side) for (shape, color), cell in zip(kinds, cells, strict=True)]
    light = (rng.randint(222, 250), rng.randint(222, 250), rng.randint(222, 250))
    step = rng.randint(8, 20)
    dark = (light[0] - step, light[1] - step, light[2] - step)
    return Scene(side, rng.choice(BACKGROUNDS), (light, dark), rng.getrandbits(32), tuple(objects))


def _sample_kind(rng: random.Random, kinds: list[tuple[str, str]], world: World) -> tuple[str, str]:
    shape, color = rng.choice(world.shapes), rng.choice(world.colors)
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
