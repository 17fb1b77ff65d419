"""Weights of one network in another that differs from it in image size, number of patches or length of the texts.

Only tables of positions depend on these, and each part resizes its own (`resized_position`). A tower for a further
modality (`others.NAME`) may also be new as a whole. Anything else that differs is another network, and refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.errors import ConfigError

_MOST_NAMED = 4


def resized_grid(position_PD: Tensor, like_PD: Tensor, *, num_front: int) -> Tensor:
    """Positions of a square grid of patches, row by row, with the number of rows of `like_PD`: bicubic, antialiased.

    The first `num_front` (class token) stay. What is no square grid is returned as it is.
    """
    if position_PD.shape[0] == like_PD.shape[0]:
        return position_PD
    front_FD, grid_PD = position_PD[:num_front], position_PD[num_front:]
    side, new_side = math.isqrt(len(grid_PD)), math.isqrt(len(like_PD) - num_front)
    if side * side != len(grid_PD):
        return position_PD
    image = grid_PD.T.unflatten(1, (side, side))[None]
    image = F.interpolate(image, size=(new_side, new_side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([front_FD, image[0].flatten(1).T])


def resized_sequence(position_TD: Tensor, like_TD: Tensor) -> Tensor:
    """Positions of a text with the number of rows of `like_TD`: the first ones of a longer table, a shorter one
    stretched linearly, its first and its last row at the ends."""
    length = like_TD.shape[0]
    if position_TD.shape[0] >= length:
        return position_TD[:length]
    return F.interpolate(position_TD.T[None], size=length, mode="linear", align_corners=True)[0].T


def adapted(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the positions of every part of `module` in the part's own size."""
    result = dict(state)
    for name, part in module.named_modules():
        key = f"{name}.position"
        if key in result and hasattr(part, "resized_position") and result[key].ndim == 2:
            result[key] = part.resized_position(result[key])
    return result


def new_towers(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the towers in `others` of which `state` has nothing at all."""
    others = getattr(module, "others", None) or {}
    return [name for name in others if not any(key.startswith(f"others.{name}.") for key in state)]


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, whose: str) -> None:
    """Fills `module` from weights of `whose`, but for its `new_towers`, which keep their first values; a module on the
    meta device is only compared with them.

    Raises:
        ConfigError: names or shapes that differ otherwise than in the number of positions.
    """
    fresh = tuple(f"others.{name}." for name in new_towers(module, state))
    own = module.state_dict()
    given = {name: tensor for name, tensor in own.items() if name.startswith(fresh)} | adapted(module, state)
    shapes = [
        f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    differences = {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "another shape": shapes,
    }
    told = [f"{kind}: {_some(sorted(names))}" for kind, names in differences.items() if names]
    if told:
        raise ConfigError(
            f"the weights of {whose} do not fit this {type(module).__name__}",
            got="; ".join(told),
            allowed="the same network, or with new towers in model.others; image size, number of patches and context "
            "length may differ",
            remedy="set model and objective as in the config.yaml of that run, or start from parts: init={vision: RUN}",
        )
    if not any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict(given)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
