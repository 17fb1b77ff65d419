"""What patch dropout saves: training images a second of a vision tower with all patches and with half of them.

    python scripts/bench/patch_dropout.py               5 pairs of 2 steps, ViT-S/16 of 6 blocks, 224 px; about a minute
    python scripts/bench/patch_dropout.py --full        9 pairs of 4 steps, 12 blocks

A step is forward and backward of the image tower of a dual encoder, and the two sides run in turn in one process. The
control leaves the patches in the sequence and hides them from attention instead, which costs as much as reading them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, arguments, report

from vlm_train.models.patches import kept_patches, num_kept
from vlm_train.models.vision.vit import VisionTransformer

BATCH, SIZE, PATCH = 8, 224, 16


def main() -> int:
    options = arguments(__doc__)
    num_pairs, num_steps, num_layers = (9, 4, 12) if options.full else (5, 2, 6)
    torch.manual_seed(0)
    tower = VisionTransformer(image={"size": SIZE}, patch_size=PATCH, width=384, num_layers=num_layers, num_heads=6)
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    draws = torch.arange(BATCH)
    num = num_kept(tower.num_patches, 0.5)
    sides: dict[str, Callable[[], Tensor]] = {
        "all": lambda: tower(images),
        "half": lambda: tower(images, kept_patches(draws, num_patches=tower.num_patches, num_kept=num)),
        "hidden": lambda: hidden(tower, images, draws, num),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(num_pairs + 1):  # the first warms up
        for name, forward in sides.items():
            rates[name].append(images_a_second(tower, forward, num_steps))
        if number:
            told = ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items())
            print(f"pair {number}, images/s: {told}")
    gain, control = (
        statistics.median(fast / slow for fast, slow in zip(rates[name][1:], rates["all"][1:], strict=True))
        for name in ("half", "hidden")
    )
    claim = "images/s of the vision tower, half of the patches / all"
    return report([Row(claim=claim, value=gain, bar=1.5, sense=">=", control=control)], options.json)


def hidden(tower: VisionTransformer, images: Tensor, draws: Tensor, num: int) -> Tensor:
    """Every patch goes through the tower; those that are left out are not attended to."""
    kept = kept_patches(draws, num_patches=tower.num_patches, num_kept=num)
    mask = torch.zeros(len(images), tower.num_patches, dtype=torch.bool).scatter_(1, kept, True)
    mask = torch.cat([torch.ones(len(images), 1, dtype=torch.bool), mask], dim=1)[:, None, None, :]
    x = tower.patch_embed(images)
    x = torch.cat([tower.class_token.expand(len(x), 1, -1), x], dim=1) + tower.position
    for block in tower.blocks:
        x = block(x, mask=mask)
    return tower.post_norm(x)[:, 0]


def images_a_second(tower: VisionTransformer, forward: Callable[[], Tensor], num_steps: int) -> float:
    start = time.perf_counter()
    for _ in range(num_steps):
        tower.zero_grad()
        forward().square().sum().backward()
    return num_steps * BATCH / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
