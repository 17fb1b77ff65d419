"""Vision transformer, general enough to hold the image towers of CLIP, open_clip and SigLIP exactly.

1. Cut the image into patches and project each (one convolution whose stride is its kernel).
2. Put a class token in front where the pooling reads one; add learned positions; normalise first where CLIP does.
3. Take out the patches that the caller leaves out, if any (see `patches`).
4. Run the blocks; a class-token tower computes only that token in the last one (see `layers`).
5. Normalise and pool: `cls` the class token, `mean` the average patch, `map` a learned query.

Sources: Dosovitskiy et al. 2021; Radford et al. 2021 (cls, pre_norm); Zhai et al. 2023 (map).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.adapt import resized_grid
from vlm_train.models.layers import (
    Activation,
    AttentionPool,
    blocks_flops,
    first_of,
    make_blocks,
    prepend,
    run_blocks,
)
from vlm_train.models.vision.image import as_image_spec
from vlm_train.models.vision.stem import ConvStem
from vlm_train.types import ImageSpec

Layer = int
"""A hidden state of a tower, counted from behind as transformers does: -1 behind the last block, without the last norm,
-2 behind the block before it. With a name of its own since the integers of a config are counts otherwise."""


class PatchEmbedding(nn.Conv2d):
    """Non-overlapping patches, square or (height, width), through one linear map: [B, C, H, W] -> [B, P, D]."""

    def __init__(self, *, patch_size: int | tuple[int, int], width: int, bias: bool, num_channels: int = 3) -> None:
        super().__init__(num_channels, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def reset_parameters(self) -> None:
        """Weight normal(0, 1/sqrt(values in a patch)), bias 0."""
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """The cast is for sharded low precision, which casts parameters but not the pixels made inside the model."""
        return super().forward(input.to(self.weight.dtype)).flatten(2).transpose(1, 2)

    def forward_flops(self, size: int) -> float:
        """FLOPs of one square image of `size` pixels a side."""
        return 2.0 * self.weight.numel() * (size // self.kernel_size[0]) * (size // self.kernel_size[1])


class VisionTransformer(nn.Module):
    """Image tower: normalised pixels [B, 3, S, S] -> one vector per image [B, D].

    Args:
        image: an ImageSpec or its keys: `size` (a multiple of `patch_size`), `mean`, `std`, `resize`.
        patch_size: side of a patch in pixels.
        width: D, also `out_dim`.
        num_layers: number of blocks.
        num_heads: attention heads per block, a divisor of `width`.
        mlp_dim: hidden width of the MLPs; 4 * width unless given.
        activation: `gelu`, `gelu_tanh` or `quick_gelu`; it must be the one the weights were trained with.
        norm_eps: epsilon of the layer norms (CLIP 1e-5, SigLIP 1e-6).
        pool: `cls`, `mean` or `map`.
        pre_norm: CLIP's layer norm before the first block. The patch projection then has no bias, which the norm's
            own bias would repeat.

    Raises:
        ConfigError: sizes that do not divide, an unknown pool or activation.
    """

    def __init__(
        self,
        *,
        image: ImageSpec | Mapping[str, Any],
        patch_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int | None = None,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        pool: Literal["cls", "mean", "map"] = "cls",
        pre_norm: bool = True,
    ) -> None:
        super().__init__()
        self.image_spec = as_image_spec(image)
        self.patch_size, self.out_dim, self.pool = patch_size, width, pool
        self.num_patches, self.num_layers = self._count_patches(), num_layers
        mlp_dim = 4 * width if mlp_dim is None else mlp_dim
        self.patch_embed: PatchEmbedding | ConvStem = PatchEmbedding(
            patch_size=patch_size, width=width, bias=not pre_norm
        )
        self.class_token = nn.Parameter(torch.empty(width)) if pool == "cls" else None
        self.position = nn.Parameter(torch.empty(self.num_patches + (pool == "cls"), width))
        self.pre_norm = nn.LayerNorm(width, eps=norm_eps) if pre_norm else None
        self.blocks = make_blocks(
            num_layers, width=width, num_heads=num_heads, mlp_dim=mlp_dim, activation=activation, norm_eps=norm_eps
        )
        self.post_norm: nn.Module = nn.LayerNorm(width, eps=norm_eps)
        self.attention_pool = (
            AttentionPool(width=width, num_heads=num_heads, mlp_dim=mlp_dim, activation=activation, norm_eps=norm_eps)
            if pool == "map"
            else None
        )
        self.reset_parameters()

    def _count_patches(self) -> int:
        if self.pool not in ("cls", "mean", "map"):
            raise ConfigError(
                "unknown pooling of a vision transformer",
                got=self.pool,
                allowed=["cls", "mean", "map"],
                remedy="set model.vision.pool=cls",
            )
        if self.image_spec.size % self.patch_size:
            raise ConfigError(
                "the image side must be a multiple of the patch side",
                got=f"image.size={self.image_spec.size}, patch_size={self.patch_size}",
                remedy=f"set image.size={self.image_spec.size // self.patch_size * self.patch_size}",
            )
        return (self.image_spec.size // self.patch_size) ** 2

    def reset_parameters(self) -> None:
        """Class token and positions start normal(0, 1/sqrt(D))."""
        std = self.out_dim**-0.5
        nn.init.normal_(self.position, std=std)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=std)

    def forward(self, pixels_B3SS: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] normalised -> [B, D], not L2-normalised; `kept_BK` int64: the only patches that are read."""
        x_BPD = self._run(pixels_B3SS, kept_BK, reads_all=self.class_token is None)
        if self.attention_pool is not None:
            return self.attention_pool(x_BPD)
        return x_BPD.mean(dim=1)  # under `cls` one token is left, and its mean is itself

    def tokens(self, pixels_B3SS: Tensor, kept_BK: Tensor | None = None, layer: Layer | None = None) -> Tensor:
        """As `forward`, before any pooling: every token [B, P, D], the class token first where the tower has one.

        `layer`: None is behind all blocks and the last norm; blocks behind another are not run.
        """
        return self._run(pixels_B3SS, kept_BK, reads_all=True, layer=layer)

    def drop_unread(self, layer: Layer | None) -> None:
        """Takes out what `tokens` at this layer does not run, so that no parameter is left without a gradient; the
        numbers of layers stay. Raises ConfigError where there is no such layer."""
        if layer is None:
            return
        check_layer(layer, self.num_layers)
        self.blocks, self.post_norm = self._blocks_before(layer), nn.Identity()

    def _blocks_before(self, layer: Layer | None) -> nn.ModuleList:
        num_blocks = self.num_layers + 1 + (-1 if layer is None else layer)
        return self.blocks if num_blocks >= len(self.blocks) else self.blocks[:num_blocks]

    def _run(
        self, pixels_B3SS: Tensor, kept_BK: Tensor | None, *, reads_all: bool, layer: Layer | None = None
    ) -> Tensor:
        x_BPD = self.patch_embed(pixels_B3SS)
        if self.class_token is not None:
            x_BPD = prepend(self.class_token, x_BPD)
        x_BPD = x_BPD + self.position.to(x_BPD.dtype)
        if kept_BK is not None:
            kept_BK = kept_BK if self.class_token is None else F.pad(kept_BK + 1, (1, 0))  # the class token is first
            x_BPD = x_BPD.gather(1, kept_BK[:, :, None].expand(-1, -1, x_BPD.shape[-1]))
        if self.pre_norm is not None:
            x_BPD = self.pre_norm(x_BPD)
        read_B = None if reads_all else first_of(x_BPD)
        x_BPD = run_blocks(self._blocks_before(layer), x_BPD, read_B=read_B)
        return x_BPD if layer is not None else self.post_norm(x_BPD)

    def resized_position(self, position_PD: Tensor) -> Tensor:
        """The positions of a tower for another image size or patch size, at the size of this one."""
        return resized_grid(position_PD, self.position, num_front=int(self.pool == "cls"))

    def forward_flops(self, num_kept: int | None = None) -> float:
        """Forward FLOPs of one image of which `num_kept` patches are read (default: all), as executed (the last block
        of a `cls` tower runs one query)."""
        flops = self._flops(num_kept, reads_one=self.pool == "cls")
        num_tokens = self.num_tokens(num_kept)
        return flops + (self.attention_pool.forward_flops(num_tokens) if self.attention_pool is not None else 0.0)

    def tokens_flops(self, num_kept: int | None = None, layer: Layer | None = None) -> float:
        """As `forward_flops`, of `tokens`."""
        return self._flops(num_kept, reads_one=False, layer=layer)

    @property
    def has_class_token(self) -> bool:
        """Whether `tokens` begin with one."""
        return self.pool == "cls"

    def num_tokens(self, num_kept: int | None = None) -> int:
        """Length of the sequence when `num_kept` patches are read (default: all)."""
        return (self.num_patches if num_kept is None else num_kept) + (self.pool == "cls")

    def _flops(self, num_kept: int | None, *, reads_one: bool, layer: Layer | None = None) -> float:
        return self.patch_embed.forward_flops(self.image_spec.size) + blocks_flops(
            self._blocks_before(layer), self.num_tokens(num_kept), reads_one=reads_one
        )


def check_layer(layer: object, num_layers: int) -> None:
    """Refuses a layer that a tower of `num_layers` blocks does not have, and its bare patches. Raises ConfigError."""
    if not isinstance(layer, int) or not -num_layers <= layer < 0:
        raise ConfigError(
            "the image tower has no such layer",
            got=f"feature_layer={layer}",
            allowed=f"-1, behind the last block, to -{num_layers}, behind the first; null for the last norm too",
            remedy="set model.feature_layer",
        )


class ConvVisionTransformer(VisionTransformer):
    """A vision transformer whose patches come through a few small convolutions; arguments as there, pooled by the mean.

    Args:
        image: see `VisionTransformer`.
        patch_size: a power of two.
        width: D, see `ConvStem`.
        num_layers: number of blocks.
        num_heads: attention heads per block, a divisor of `width`.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(
        self, *, image: ImageSpec | Mapping[str, Any], patch_size: int, width: int, num_layers: int, num_heads: int
    ) -> None:
        super().__init__(
            image=image, patch_size=patch_size, width=width, num_layers=num_layers, num_heads=num_heads, pool="mean"
        )
        self.patch_embed = ConvStem(patch_size=patch_size, width=width)
