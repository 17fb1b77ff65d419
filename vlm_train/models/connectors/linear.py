"""Connectors that map every patch by itself: one linear, or the perceptron of LLaVA-1.5."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vlm_train.models.connectors.base import Connector, require_counts
from vlm_train.models.layers import Linear, linear_flops


class MLPConnector(Connector):
    """A linear, then a GELU and a linear for each further layer, all of width D but for what comes in; with biases.

    LLaVA-1.5's `mlp2x_gelu` (Liu et al. 2023, arXiv 2310.03744), and by another `num_layers` its `mlpNx_gelu`; the
    weights have its names. A token for each patch.

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model.
        num_patches: P of one image.
        num_layers: number of linears.

    Raises:
        ConfigError: no layer.
    """

    keeps_places = True

    def __init__(self, *, in_dim: int, out_dim: int, num_patches: int, num_layers: int = 2) -> None:
        super().__init__()
        require_counts({"num_layers": num_layers})
        self.num_tokens = num_patches
        self.layers = nn.Sequential(Linear(in_dim, out_dim, std=in_dim**-0.5))
        for _ in range(num_layers - 1):
            self.layers.extend([nn.GELU(), Linear(out_dim, out_dim, std=out_dim**-0.5)])

    def forward(self, x_NPD: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, P, D]."""
        return self.layers(x_NPD)

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        return sum(linear_flops(cast(Linear, linear), self.num_tokens) for linear in self.layers[::2])


class LinearConnector(MLPConnector):
    """One linear with bias, a token for each patch: the connector of LLaVA (Liu et al. 2023, arXiv 2304.08485).

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model.
        num_patches: P of one image.
    """

    def __init__(self, *, in_dim: int, out_dim: int, num_patches: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, num_patches=num_patches, num_layers=1)
