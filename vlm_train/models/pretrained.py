"""What all adapters of foreign networks share: staying frozen, finding blocks.

A part is frozen when none of its parameters learns; that is said in one place, `optim.groups`. Then it also runs
without a graph (no activations are kept) and stays in evaluation mode whatever the trainer says, so that its dropout
is off and its batch statistics do not drift.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


class PretrainedTower(nn.Module):
    """Base of the adapters.

    Args:
        network: the foreign module.
    """

    def __init__(self, *, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def frozen(self) -> bool:
        """Whether nothing of this part learns."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def requires_grad_(self, requires_grad: bool = True) -> PretrainedTower:
        """As `nn.Module.requires_grad_`; a part that freezes goes into evaluation mode at once."""
        super().requires_grad_(requires_grad)
        return self.train(self.training)

    def train(self, mode: bool = True) -> PretrainedTower:
        """As `nn.Module.train`, except that a frozen part stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def gradients(self) -> AbstractContextManager[None]:
        """Gradients as the caller has them, or none when frozen."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)

    @property
    def blocks(self) -> nn.ModuleList:
        """The network's repeated layers: its longest list. A property, so that no parameter gets a second name."""
        lists = [part for part in self.network.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
        return nn.ModuleList(max(lists, key=len, default=()))


def on_meta() -> bool:
    """Whether modules are being built without memory; then there is nothing to load weights into."""
    return torch.get_default_device().type == "meta"
