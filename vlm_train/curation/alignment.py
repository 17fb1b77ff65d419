"""Whether two thumbnails (see `views`) show one picture: as it is, with its edges cut off, or covered in one place.

*The same*: no mean of 2 x 2 cells of brightness differs by more than `SAME`, no cell of colour by more than `SAME`.

*Cropped*: what the second shows is laid over the first, cut by at most `MOST_CUT` of each side, where it fits best (the
least squares of Lucas and Kanade, IJCAI 1981, from `START` of each side on), and is then the same within `CROPPED` and
`CROPPED_COLOUR`; one side is cut by `LEAST_CUT`, for two drawings that differ by a smile fit best uncut. The outermost
cells are left out: a thumbnail is smoothed with what lies beyond its edge in one of the two only.

*Covered*: all that differs by more than `SAME_UNCOVERED` lies in one box of `LEAST_COVERED` to `MOST_COVERED` of the
picture and fills `LEAST_FILLED` of it; in the second the box has one colour that ends with it (a label, a sticker, a
bar), for two drawings that differ by an expression would be no different otherwise; and the rest differs by at most
`MOST_DIFFERING` of its own detail, for two empty walls are the same wherever they are.

`tolerance` multiplies all of these levels; it is 1 where they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation.views import COLOUR_SIDE, SIDE, planes

VERSION = "2"
"""Of the rules below and their numbers."""

SAME = 10.0
CROPPED, CROPPED_COLOUR = 24.0, 16.0
SAME_UNCOVERED = 12.0
"""Of 256 levels."""
START, LEAST_CUT, MOST_CUT = 0.025, 0.008, 0.06
LEAST_COVERED, MOST_COVERED, LEAST_FILLED = 0.02, 0.15, 0.6
ONE_COLOUR, LEAST_OF_ONE = 6.0, 0.7
"""Levels around its median brightness within which so much of the middle of a box lies."""
AS_COLOURED, MOST_BESIDE = 8.0, 0.3
"""Levels around its median brightness and colour within which so much lies, at most, of what is next to a box."""
MOST_DIFFERING, LEAST_DETAIL = 0.2, 0.15
"""Root mean square difference of the rest over its standard deviation, and that in levels."""

_HOPELESS = (45.0, 20.0, 16.0, 16.0)
"""Root mean square differences above which no further step helps, from the start on; copies have up to 40, 15, 11."""
_STEP = 0.004  # of a side: between the two places by which a slope is told
_STIFFNESS = 10.0  # squared levels: keeps places where there is little to go by
_SMEARED = 3  # cells by which smoothing widens what differs, at both ends together; and a box, at each end at most

_MOST_BLOCKS = 28  # of 64 that a box of `MOST_COVERED` can touch, smeared as it is
_ROUNDING = 0.01  # levels by which float32 may err

Thumbnails = NDArray[np.uint8]  # [n, THUMBNAIL_BYTES]
Planes = NDArray[np.float64]
Flags = NDArray[np.bool_]
Few = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Coarse:
    """Of n thumbnails what tells at once that two of them are no copies; no pair that any rule holds for is lost.

    `blocks` [n, 64]: mean brightness of 4 x 4 cells; `insides`, `middles` [n, 36]: of 5 x 5 cells of the thumbnail
    without its outermost cells, and of what `are_cropped` lays over another one first.
    """

    blocks: Few
    insides: Few
    middles: Few

    @staticmethod
    def of(thumbnails: Thumbnails) -> Coarse:
        """Of thumbnails."""
        seen = thumbnails[:, : SIDE * SIDE].astype(np.float32) @ _COARSE
        return Coarse(seen[:, :64], seen[:, 64:100], seen[:, 100:])

    def may_be_same(self, other: Coarse, tolerance: float) -> Flags:
        """bool [n]: False where `are_same` is."""
        return np.asarray((np.abs(self.blocks - other.blocks) <= SAME * tolerance + _ROUNDING).all(axis=1))

    def may_be_covered(self, other: Coarse, tolerance: float) -> Flags:
        """bool [n]: False where `are_covered` is."""
        differing = np.abs(self.blocks - other.blocks) > SAME_UNCOVERED * tolerance + _ROUNDING
        return np.asarray(differing.sum(axis=1) <= _MOST_BLOCKS)

    def may_be_cropped(self, other: Coarse, tolerance: float) -> Flags:
        """bool [n]: False where `are_cropped` is."""
        apart = ((self.middles - other.insides) ** 2).mean(axis=1)
        return np.asarray(apart <= (_HOPELESS[0] * tolerance + _ROUNDING) ** 2)


def are_same(first: Thumbnails, second: Thumbnails, tolerance: float = 1.0) -> Flags:
    """bool [n]: whether the pictures are the same, one by one."""
    return np.asarray(~_differing(first, second, SAME * tolerance).any(axis=(1, 2)))


def are_covered(first: Thumbnails, second: Thumbnails, tolerance: float = 1.0) -> Flags:
    """bool [n]: whether the second is the first with a box of one colour on it."""
    differing = _differing(first, second, SAME_UNCOVERED * tolerance)
    inside = _boxes(differing)
    heights, widths = inside.any(axis=2).sum(axis=1), inside.any(axis=1).sum(axis=1)
    shares = np.maximum(heights - _SMEARED, 1) * np.maximum(widths - _SMEARED, 1) / SIDE**2
    filled = differing.sum(axis=(1, 2)) >= LEAST_FILLED * inside.sum(axis=(1, 2))
    are = inside.any(axis=(1, 2)) & (shares >= LEAST_COVERED) & (shares <= MOST_COVERED) & filled
    for row in np.flatnonzero(are):
        pair = planes(first[row, None]), planes(second[row, None])
        box = [(int(seen[0]), int(seen[-1])) for seen in map(np.flatnonzero, (inside[row].any(1), inside[row].any(0)))]
        are[row] = _is_of_one_colour(pair[1], box, tolerance) and _is_the_rest_the_same(pair, box, tolerance)
    return are


def _is_of_one_colour(seen: tuple[Planes, Planes], box: Sequence[tuple[int, int]], tolerance: float) -> bool:
    """Whether a box (first and last place where means of 2 x 2 cells differ, down and across) has in its middle one
    brightness, and a colour that does not go on around it."""
    channels = [seen[0][0], *seen[1][0].repeat(2, axis=1).repeat(2, axis=2)]
    insets = [min(_SMEARED, (last - first + 1) // 2) for first, last in box]
    middle = tuple(slice(low + inset, high + 2 - inset) for (low, high), inset in zip(box, insets, strict=True))
    medians = [np.median(channel[middle]) for channel in channels]
    if (np.abs(channels[0][middle] - medians[0]) <= ONE_COLOUR * tolerance).mean() < LEAST_OF_ONE:
        return False
    is_around = np.zeros((SIDE, SIDE), bool)
    is_around[tuple(slice(max(0, low - 1), high + 3) for low, high in box)] = True
    is_around[tuple(slice(low, high + 2) for low, high in box)] = False
    apart = [np.abs(channel - median)[is_around] for channel, median in zip(channels, medians, strict=True)]
    return bool((np.max(apart, axis=0) <= AS_COLOURED * tolerance).mean() <= MOST_BESIDE)


def _is_the_rest_the_same(
    pair: Sequence[tuple[Planes, Planes]], box: Sequence[tuple[int, int]], tolerance: float
) -> bool:
    """Whether what lies beside a box, and one cell off it, differs by little of what is seen there."""
    difference, detail = 0.0, np.zeros(2)
    for values in zip(*([*grey, *colours[0]] for grey, colours in pair), strict=True):
        cells = SIDE // len(values[0])  # of the finer grid, in one
        is_beside = np.ones(values[0].shape, bool)
        is_beside[tuple(slice(max(0, low - 1) // cells, (high + 2) // cells + 1) for low, high in box)] = False
        one, other = (plane[is_beside] for plane in values)
        if not len(one):
            return False
        difference += float(((one - other) ** 2).mean())
        detail += [one.var(), other.var()]
    least = float(detail.min())
    return least >= LEAST_DETAIL**2 and difference <= (MOST_DIFFERING * tolerance) ** 2 * least


def are_cropped(first: Thumbnails, second: Thumbnails, tolerance: float = 1.0) -> Flags:
    """bool [n]: whether the second is the first with its edges cut off."""
    (whole, colours), (part, part_colours) = planes(first), planes(second)
    cuts = np.full((len(whole), 4), START)
    first_of_all, *then = (level * tolerance for level in _HOPELESS)
    rows = np.flatnonzero(_distance(_MIDDLE @ whole @ _MIDDLE.T, part) <= first_of_all)
    for hopeless in then:
        cuts[rows] = _moved(whole[rows], part[rows], cuts[rows])
        laid = _laid(whole[rows], cuts[rows], SIDE)
        rows = rows[_distance(laid, part[rows]) <= hopeless]
    differ = _smoothed(_laid(whole[rows], cuts[rows], SIDE) - part[rows])[:, 1:-1, 1:-1]
    tints = np.stack([_laid(colours[rows, tint], cuts[rows], COLOUR_SIDE) for tint in (0, 1)], axis=1)
    tints = (tints - part_colours[rows])[:, :, 1:-1, 1:-1]
    fits = cuts[rows].max(axis=1) >= LEAST_CUT
    fits &= np.abs(differ).max(axis=(1, 2), initial=0) <= CROPPED * tolerance
    fits &= np.abs(tints).max(axis=(1, 2, 3), initial=0) <= CROPPED_COLOUR * tolerance
    are = np.zeros(len(whole), bool)
    are[rows[fits]] = True
    return are


def _moved(whole: Planes, part: Planes, cuts: Planes) -> Planes:
    """Cuts [n, 4] (top, bottom, left, right) under which the part fits better: one step of least squares."""
    down, across = (_resampling(cuts[:, pair], SIDE) for pair in (slice(0, 2), slice(2, 4)))
    slopes = []
    for number in range(4):
        nudged = cuts + _STEP * (np.arange(4) == number)
        if number < 2:
            change = (_resampling(nudged[:, :2], SIDE) - down) @ whole @ across.transpose(0, 2, 1)
        else:
            change = down @ whole @ (_resampling(nudged[:, 2:], SIDE) - across).transpose(0, 2, 1)
        slopes.append(change.reshape(-1, SIDE**2) / _STEP)
    slope = np.stack(slopes, axis=1)
    rest = (part - down @ whole @ across.transpose(0, 2, 1)).reshape(-1, SIDE**2, 1)
    normal = slope @ slope.transpose(0, 2, 1) + _STIFFNESS * np.eye(4)
    step = np.linalg.solve(normal, slope @ rest)[:, :, 0]
    return np.clip(cuts + np.clip(step, -START, START), 0, MOST_CUT)


def _laid(planes: Planes, cuts: Planes, side: int) -> Planes:
    """What is left of planes [n, side, side] when they are cut, as large again."""
    return np.asarray(_resampling(cuts[:, :2], side) @ planes @ _resampling(cuts[:, 2:], side).transpose(0, 2, 1))


def _resampling(cuts: Planes, side: int) -> Planes:
    """[n, side, side]: values at `side` places between cuts [n, 2] of both ends, by cubic convolution (Keys 1981)."""
    left = 1 - cuts.sum(axis=1)[:, None, None]
    places = (cuts[:, 0, None, None] + left * ((np.arange(side) + 0.5) / side)[:, None]) * side - 0.5
    apart = np.abs(places - np.arange(side))
    near, far = (1.5 * apart - 2.5) * apart**2 + 1, ((-0.5 * apart + 2.5) * apart - 4) * apart + 2
    weights = np.where(apart < 1, near, np.where(apart < 2, far, 0))
    return np.asarray(weights / weights.sum(axis=2, keepdims=True))


def _distance(first: Planes, second: Planes) -> NDArray[np.float64]:
    """Root mean square difference of planes [n, 32, 32] without their outermost cells: [n]."""
    return np.sqrt(((first - second)[:, 1:-1, 1:-1] ** 2).mean(axis=(1, 2)))


def _smoothed(values: Planes) -> Planes:
    """Means of 2 x 2 cells: [n, h, w] -> [n, h - 1, w - 1]."""
    rows = values[:, 1:] + values[:, :-1]
    return (rows[:, :, 1:] + rows[:, :, :-1]) / 4


def _differing(first: Thumbnails, second: Thumbnails, tolerance: float) -> Flags:
    """bool [n, 31, 31]: where two thumbnails differ by more than the tolerance."""
    (grey, colours), (other, other_colours) = planes(first), planes(second)
    tints = (np.abs(colours - other_colours) > tolerance).any(axis=1)
    wide = tints.repeat(2, axis=1).repeat(2, axis=2)[:, : SIDE - 1, : SIDE - 1]
    return np.asarray((np.abs(_smoothed(grey - other)) > tolerance) | wide)


def _boxes(flags: Flags) -> Flags:
    """The least box around the flags of each: [n, h, w]."""
    spans = []
    for axis in (2, 1):
        seen = np.asarray(flags.any(axis=axis), np.uint8)
        before, behind = np.maximum.accumulate(seen, axis=1), np.maximum.accumulate(seen[:, ::-1], axis=1)[:, ::-1]
        spans.append(before & behind)
    return np.asarray(spans[0][:, :, None] & spans[1][:, None, :], np.bool_)


def _coarse() -> Few:
    """What `Coarse` is made with, out of brightness: [1024, 64 + 36 + 36]."""
    fours = np.kron(np.eye(8), np.full((1, 4), 1 / 4))
    fives = np.pad(np.kron(np.eye(6), np.full((1, 5), 1 / 5)), ((0, 0), (1, 1)))
    ways = (fours, fives, fives @ _MIDDLE)
    return np.concatenate([np.kron(way, way) for way in ways]).T.astype(np.float32)


_MIDDLE = _resampling(np.full((1, 2), START), SIDE)[0]
_COARSE = _coarse()
