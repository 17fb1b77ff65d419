"""Layer-wise decay of the learning rate, for towers that have learned before: the lower a layer, the slower it learns.

Layers count from the bottom: what stands before the first block (embeddings) is layer 0, block i is layer i + 1, what
stands behind the last of n blocks is layer n + 1. A layer learns at decay^(n + 1 - layer) of its peak rate, and what is
in no tower (projections, the objective) at the whole of it.

Sources: ELECTRA (arXiv 2003.10555), BEiT (arXiv 2106.08254).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from torch import nn

from vlm_train.errors import ConfigError

_NUMBERED = re.compile(r"(|.*?\D)(\d+)\.")
"""The first part of a name that ends in a number: `blocks.3.`, `encoder.layer.11.`, `layer4.`."""


def layer_factors(model: nn.Module, decay: float, learning: Collection[str]) -> dict[str, float]:
    """Name -> factor of the peak rate, for the parameters `learning` (names within the model) inside its towers.

    A tower is a part with an `out_dim`, as `models.dual_encoder` demands of one. Raises ConfigError for a tower that
    learns and whose names show no layers, and for a model without towers.
    """
    towers = {name: part for name, part in model.named_children() if hasattr(part, "out_dim")}
    if not towers:
        raise ConfigError(
            "optim.layer_decay: the model has no towers", got=type(model).__name__, allowed="a model of towers",
            remedy="optim.layer_decay=null",
        )  # fmt: skip
    factors: dict[str, float] = {}
    for tower, part in towers.items():
        names = [name for name, _ in part.named_parameters()]
        mine = [name for name in names if f"{tower}.{name}" in learning]
        layers, top = layers_of(names)
        if mine and not layers:
            raise ConfigError(
                f"optim.layer_decay: no depth can be seen in the tower {tower}", got=", ".join(names[:3]),
                allowed="names with a numbered list of layers, such as blocks.0 and blocks.1",
                remedy="optim.layer_decay=null, or freeze the tower by optim.groups",
            )  # fmt: skip
        factors |= {f"{tower}.{name}": decay ** (top - layers[name]) for name in mine}
    return factors


def layers_of(names: Sequence[str]) -> tuple[dict[str, int], int]:
    """(name -> layer, the layer behind the blocks), for the names of a tower in the order of its parts. Empty where no
    name has a number.

    The blocks are the numbered parts under which most parameters lie.
    """
    found = [_NUMBERED.match(name) for name in names]
    stems = Counter(match[1] for match in found if match)
    if not stems:
        return {}, 0
    stem = stems.most_common(1)[0][0]
    numbers = [int(match[2]) if match and match[1] == stem else None for match in found]
    layer_of = {number: layer for layer, number in enumerate(sorted({n for n in numbers if n is not None}), start=1)}
    first, top = next(place for place, number in enumerate(numbers) if number is not None), len(layer_of) + 1
    outside = [0 if place < first else top for place in range(len(names))]
    layers = [other if number is None else layer_of[number] for number, other in zip(numbers, outside, strict=True)]
    return dict(zip(names, layers, strict=True)), top
