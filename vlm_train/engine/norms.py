"""How large weights and their gradients are: all that learns together, and each part of the model by itself.

A part is a module that the model is made of (`vision`, `text`, `connector`, ...), and `objective`. The norm of each
tensor is taken once; those of the parts and of the whole follow from these few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_train.engine import sharding


class Learning:
    """What an optimizer learns, part by part.

    Args:
        groups: of an optimizer that was made of named parameters.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        places = [part_of(name) for group in groups for name in group["param_names"]]
        self.parts = sorted(set(places))
        rows = [[place == part for place in places] for part in self.parts]
        self._members_PN = torch.tensor(rows, device=self.parameters[0].device)

    def gradients(self) -> list[Tensor]:
        """Those that there are, in the order of the parameters."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def of_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(L2 norm of all gradients, `grad_norm/PART`), scalars, equal on every rank. Collective where sharded."""
        there = torch.tensor([parameter.grad is not None for parameter in self.parameters])
        norms_N = sharding.norms(self.gradients())
        members_PN = self._members_PN if there.all() else self._members_PN[:, there.to(norms_N.device)]
        return torch.linalg.vector_norm(norms_N), self._by_part("grad_norm", members_PN, norms_N)

    def of_parameters(self) -> dict[str, Tensor]:
        """`param_norm` of all that learns, and `param_norm/PART`, likewise."""
        norms_N = sharding.norms(self.parameters)
        by_part = self._by_part("param_norm", self._members_PN, norms_N)
        return {"param_norm": torch.linalg.vector_norm(norms_N), **by_part}

    def _by_part(self, name: str, members_PN: Tensor, norms_N: Tensor) -> dict[str, Tensor]:
        squares_PN = torch.where(members_PN, norms_N.double().square(), 0.0)  # what is infinite stays in its part
        totals_P = squares_PN.sum(dim=1).sqrt()
        return {f"{name}/{part}": total for part, total in zip(self.parts, totals_P.unbind(), strict=True)}


def part_of(name: str) -> str:
    """Of a parameter `model.PART.*` or `objective.*`."""
    root, _, rest = name.partition(".")
    return rest.partition(".")[0] if root == "model" else root
