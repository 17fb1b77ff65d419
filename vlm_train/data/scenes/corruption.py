"""Damage done on purpose and written down, so that filters and robustness can be measured against the truth.

At most one kind befalls a sample. `regions` and everything else in KEY.json keep describing the undamaged picture, only
`captions` change under `caption_mismatch`; the true ones then stand in `corruption.true_captions`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from vlm_train.errors import ConfigError, nearest

KINDS = ("blur", "noise", "occlusion", "caption_mismatch")


def check_corruption(corruption: Mapping[str, float]) -> None:
    """Raises ConfigError unless `corruption` maps known kinds to probabilities that add up to at most 1."""
    for kind, probability in corruption.items():
        if kind not in KINDS:
            close = nearest(kind, KINDS)
            remedy = f"did you mean {close[0]}?" if close else None
            raise ConfigError("unknown corruption", got=kind, allowed=", ".join(KINDS), remedy=remedy)
        if probability < 0:
            raise ConfigError(f"the probability of {kind} is negative", got=probability, allowed="0 to 1")
    if sum(corruption.values()) > 1:
        raise ConfigError("the probabilities of corruptions add up to more than 1", got=dict(corruption))


def pick_corruption(rng: random.Random, corruption: Mapping[str, float]) -> str | None:
    """The kind that befalls this sample, if any."""
    chance = rng.random()
    for kind, probability in corruption.items():
        chance -= probability
        if chance < 0:
            return kind
    return None


def corrupt_image(rng: random.Random, image: np.ndarray, kind: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The damaged uint8 [S, S, 3] image and what was done to it; `kind` is blur, noise or occlusion."""
    side = len(image)
    if kind == "blur":
        radius = round(side * rng.uniform(0.015, 0.05), 2)
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))
        return np.asarray(blurred), {"kind": kind, "radius": radius}
    if kind == "noise":
        deviation = round(rng.uniform(15, 60), 1)
        noise = np.random.Generator(np.random.Philox(rng.getrandbits(64))).normal(0, deviation, image.shape)
        return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), {"kind": kind, "deviation": deviation}
    width, height = (rng.randint(side // 5, side // 2) for _ in range(2))
    left, top = rng.randint(0, side - width), rng.randint(0, side - height)
    covered = image.copy()
    covered[top : top + height, left : left + width] = 128
    return covered, {"kind": kind, "box": [left, top, left + width, top + height]}
