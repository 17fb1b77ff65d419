"""What all adapters of foreign networks share: staying frozen, finding blocks.

A frozen part must not only be left out by the optimizer. It also runs without a graph (no activations are kept) and
stays in evaluation mode whatever the trainer says, so that its dropout is off and its batch statistics do not drift.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


class PretrainedTower(nn.Module):
    """Base of the adapters.

    Args:
        network: the foreign module.
        frozen: keep it in evaluation mode, without gradients.
    """

    def __init__(self, *, network: nn.Module, frozen: bool) -> None:
        super().__init__()
        self.network, self.frozen = network, frozen
        self.requires_grad_(not frozen)
        self.train(not frozen)

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
