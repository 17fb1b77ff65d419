"""A perceiver whose patches and latents have places, for towers that hardly say in their features where a patch lies.

Latents read patches by what these are, so what a question asks of a place ("where is the red square?") must stand in
the patches. Here they are told it: sine and cosine of their row and column (Vaswani et al., arXiv 1706.03762, in two
dimensions) are added to them, and each latent starts with those of a cell of a coarser grid, near whose patches it
begins to read. Qwen-VL's resampler does so in its keys and queries (Bai et al., arXiv 2308.12966); here values have it
too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.perceiver import ProjectedPerceiver, RMSNorm
from vlm_train.models.connectors.resampler import QueryResampler

_LONGEST = 20.0  # patches to a radian, of the slowest wave


class GridPerceiverConnector(ProjectedPerceiver):
    """Patches through a gated MLP to the language model's width, normalised, with their places; then a perceiver.

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model, a multiple of 4.
        num_patches: P of one image, a square; the model leaves out a class token.
        num_latents: tokens that an image becomes, a square.
        num_layers: blocks of the resampler.
        num_heads: attention heads of a block.
        head_dim: numbers of one head; heads need not make up the width.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`.
        mlp_dim: hidden width of the projection, 4 * `out_dim` unless given.

    Raises:
        ConfigError: no latent, layer or head, heads that cannot be shared evenly, or numbers that make no grid.
    """

    places: Tensor

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_patches: int,
        num_latents: int = 64,
        num_layers: int = 3,
        num_heads: int = 16,
        head_dim: int = 96,
        num_kv_heads: int = 4,
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__(
            in_dim=in_dim,
            out_dim=out_dim,
            num_patches=num_patches,
            num_latents=num_latents,
            num_layers=num_layers,
            heads={"num_heads": num_heads, "head_dim": head_dim, "num_kv_heads": num_kv_heads},
            mlp_dim=mlp_dim,
            resampler=lambda blocks: GridResampler(
                _side("num_latents", num_latents), _side("num_patches", num_patches), width=out_dim, blocks=blocks
            ),
        )
        self.side = _side("num_patches", num_patches)
        self.register_buffer("places", torch.empty(num_patches, out_dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the buffer; it is in no checkpoint, so it must be filled again after a meta build."""
        self.places.copy_(places(self.side, self.side, self.places.shape[-1], self.places.device))

    def forward(self, x_NPD: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, num_latents, D]."""
        x_NPD = self.project(x_NPD)
        return self.resampler(F.rms_norm(x_NPD, x_NPD.shape[-1:]) + self.places.to(x_NPD.dtype))


class GridResampler(QueryResampler):
    """A resampler whose queries start on a grid.

    Args:
        side: of the grid of queries.
        full: side of the grid of what they read.
        width: D of both.
        blocks: the layers.

    Raises:
        ConfigError: a width that has no room for the waves.
    """

    def __init__(self, side: int, full: int, *, width: int, blocks: list[nn.Module]) -> None:
        if width % 4:
            raise ConfigError("places take a quarter of the width for each wave", got=f"width {width}",
                              allowed="a multiple of 4", remedy="another language model")  # fmt: skip
        self.side, self.full = side, full
        super().__init__(
            num_queries=side**2,
            width=width,
            blocks=blocks,
            mean=0.0,
            std=0.3,
            norm_last=RMSNorm(width),
        )

    def reset_parameters(self) -> None:
        """The queries start normal(0, 0.3) around their places."""
        super().reset_parameters()
        with torch.no_grad():
            self.query.add_(places(self.side, self.full, self.query.shape[-1], self.query.device))


def places(side: int, full: int, width: int, device: torch.device) -> Tensor:
    """[side^2, D]: of the middle of each of side x side cells over a grid of full x full patches, sine and cosine of
    its row, then of its column, at D / 4 wavelengths, in rows from the top left; root mean square 1."""
    quarter = width // 4
    waves = _LONGEST ** -(torch.arange(quarter, device=device) / quarter)
    angles = (torch.arange(side, device=device)[:, None] + 0.5) * (full / side) * waves
    told = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = (told[:, None].expand(-1, side, -1), told[None].expand(side, -1, -1))
    return torch.cat([rows, columns], dim=-1).reshape(side**2, width)


def _side(name: str, num: int) -> int:
    side = math.isqrt(num)
    if side * side != num:
        raise ConfigError(
            "a grid has as many rows as columns",
            got=f"{name}={num}",
            allowed="a square, such as 16 or 64",
            remedy="set model.connector.num_latents=16, and model.drop_class_token=true",
        )
    return side
