"""Boxes and masks are what can be seen in the picture."""

from __future__ import annotations

import random

import numpy as np
from scene_reader import make

from vlm_train.data.scenes.render import box_of, render
from vlm_train.data.scenes.world import COLORS, sample_scene


def test_boxes_are_the_pixels_that_one_sees():
    for index in range(300):
        scene = sample_scene(random.Random(f"scene 5 {index}"), 64)
        drawn = render(scene)
        _, truth, _ = make(index)
        colors = np.array([COLORS[item.color] for item in scene.objects])
        # found in the picture alone: pixels that show a colour of the scene pure, which no background comes near
        pure = (drawn.image[None].astype(int) == colors[:, None, None]).all(axis=-1)
        for number, row in enumerate(truth["regions"]):
            x0, y0, x1, y1 = row["box"]
            mask = drawn.masks[number]
            assert row["box"] == box_of(mask)
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
            own = pure[number] & mask
            px0, py0, px1, py1 = box_of(own)
            # the pure core lies inside, at most 2 pixels of anti-aliased edge around it (4 at the tips of a star)
            assert x0 <= px0 <= x0 + 4 and y0 <= py0 <= y0 + 4 and x1 - 4 <= px1 <= x1 and y1 - 4 <= py1 <= y1
            # the twin: a box that is one pixel off is not the extent of the mask
            assert [x0 + 1, y0, x1 + 1, y1] != box_of(mask)


def test_every_object_stays_mostly_visible():
    for index in range(300):
        scene = sample_scene(random.Random(f"scene 5 {index}"), 64)
        for item, mask in zip(scene.objects, render(scene).masks, strict=True):
            alone = render(type(scene)(scene.side, "plain", scene.tones, 0, (item,))).masks[0]
            assert mask.sum() >= 0.9 * alone.sum()  # measured: 0.965 is the least of 12,071 objects


def test_a_mask_does_not_depend_on_what_lies_beside_it():
    scene = sample_scene(random.Random("scene 5 7"), 64)
    masks = render(scene).masks
    assert not (masks.sum(axis=0) > 1).any()


def test_colors_are_far_apart_and_far_from_every_background():
    values = np.array(list(COLORS.values()), dtype=float)
    apart = np.linalg.norm(values[:, None] - values[None], axis=-1)[np.triu_indices(len(values), 1)]
    assert apart.min() > 90  # measured 95.5
    palest = np.array([202.0, 202, 202]), np.array([250.0, 250, 250])
    nearest = np.linalg.norm(values - np.clip(values, *palest), axis=-1)
    assert nearest.min() > 60  # measured 63.2 (pink), over all tones that a background can have
