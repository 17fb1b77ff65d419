"""ResNet in the form CLIP uses: a stem of three convolutions, average pooling before every stride, optional
attention pooling at the end.

The default norm is group norm. Batch norm takes its statistics from the micro-batch, so with it the result of a run
depends on how the global batch is cut over ranks and micro-batches, and the cached two-pass contrastive step computes
them twice. It is here to hold existing weights.

Sources: He et al. 2016; Radford et al. 2021 (stem, anti-aliasing, attention pooling); Wu & He 2018 (group norm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.adapt import resized_grid
from vlm_train.models.layers import Attention, count_flops
from vlm_train.models.vision.image import as_image_spec, blank_image
from vlm_train.types import ImageSpec

Norm = Literal["group", "batch"]
EXPANSION = 4
MAX_GROUPS = 32


def make_norm(name: Norm, num_channels: int) -> nn.Module:
    """Group norm with at most 32 groups of at least one channel, or batch norm."""
    if name == "batch":
        return nn.BatchNorm2d(num_channels)
    num_groups = next(groups for groups in range(MAX_GROUPS, 0, -1) if num_channels % groups == 0)
    return nn.GroupNorm(num_groups, num_channels)


class Conv(nn.Sequential):
    """Convolution without bias, norm, and ReLU where `active`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, norm: Norm, stride: int = 1, active: bool = True
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
        super().__init__(conv, make_norm(norm, out_channels), *([nn.ReLU(inplace=True)] if active else []))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; a stride is an average pool, so that nothing is aliased."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        shrink = [nn.AvgPool2d(stride)] if stride > 1 else []
        self.body = nn.Sequential(
            Conv(in_channels, channels, 1, norm=norm),
            Conv(channels, channels, 3, norm=norm),
            *shrink,
            Conv(channels, out_channels, 1, norm=norm, active=False),
        )
        is_same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity()
            if is_same
            else nn.Sequential(*shrink, Conv(in_channels, out_channels, 1, norm=norm, active=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 4 * channels, h / stride, w / stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class SpatialAttentionPool(nn.Module):
    """The mean of the feature map asks all its positions (Radford et al. 2021): [B, C, h, w] -> [B, D]."""

    def __init__(self, *, side: int, width: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(side * side + 1, width))
        self.attention = Attention(width=width, num_heads=num_heads, depth=1, out_dim=out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions start normal(0, 1/sqrt(C))."""
        nn.init.normal_(self.position, std=self.position.shape[1] ** -0.5)

    def resized_position(self, position_PD: Tensor) -> Tensor:
        """The positions of a tower for another image size, at the size of this one; the mean's is first."""
        return resized_grid(position_PD, self.position, num_front=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, D]."""
        tokens_BPD = x.flatten(2).transpose(1, 2)
        tokens_BPD = torch.cat([tokens_BPD.mean(dim=1, keepdim=True), tokens_BPD], dim=1) + self.position
        return self.attention(tokens_BPD, query_BQD=tokens_BPD[:, :1]).squeeze(1)


class ResNet(nn.Module):
    """Convolutional image tower: normalised pixels [B, 3, S, S] -> [B, D], D = `out_dim`.

    Args:
        image: an ImageSpec or its keys; `size` must be a multiple of 32.
        layers: bottlenecks per stage, four numbers (ResNet-50: 3, 4, 6, 3).
        width: channels of the first stage; the last has 32 times as many.
        norm: `group` (default) or `batch`, see the head of this file.
        pool: `mean` or `attention`.
        out_dim: D; 32 * width unless given. Only attention pooling can have another.

    Raises:
        ConfigError: sizes or choices that do not fit.
    """

    def __init__(
        self,
        *,
        image: ImageSpec | Mapping[str, Any],
        layers: Sequence[int],
        width: int = 64,
        norm: Norm = "group",
        pool: Literal["mean", "attention"] = "mean",
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.image_spec = as_image_spec(image)
        self.last_width = 8 * width * EXPANSION
        self.out_dim = self.last_width if out_dim is None else out_dim
        self._check(layers, norm, pool)
        self.stem = nn.Sequential(
            Conv(3, width // 2, 3, norm=norm, stride=2),
            Conv(width // 2, width // 2, 3, norm=norm),
            Conv(width // 2, width, 3, norm=norm),
            nn.AvgPool2d(2),
        )
        self.blocks = nn.ModuleList()
        in_channels = width
        for stage, num_blocks in enumerate(layers):
            channels = width * 2**stage
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(Bottleneck(in_channels, channels, stride=stride, norm=norm))
                in_channels = channels * EXPANSION
        self.attention_pool = (
            SpatialAttentionPool(
                side=self.image_spec.size // 32,
                width=self.last_width,
                num_heads=self.last_width // 64,
                out_dim=self.out_dim,
            )
            if pool == "attention"
            else None
        )

    def _check(self, layers: Sequence[int], norm: str, pool: str) -> None:
        problems = {
            f"layers={list(layers)}": len(layers) != 4,
            f"norm={norm}": norm not in ("group", "batch"),
            f"pool={pool}": pool not in ("mean", "attention"),
            f"image.size={self.image_spec.size}": self.image_spec.size % 32 != 0,
            f"out_dim={self.out_dim}": pool == "mean" and self.out_dim != self.last_width,
        }
        if any(problems.values()):
            raise ConfigError(
                "a ResNet cannot be built from these values",
                got=", ".join(name for name, is_wrong in problems.items() if is_wrong),
                allowed="four layers, norm group or batch, pool mean or attention, image.size a multiple of 32; "
                "another out_dim than 32 * width with pool attention only",
                remedy="correct model.vision",
            )

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, D], not L2-normalised."""
        x = self.stem(pixels_B3SS.to(next(self.parameters()).dtype))
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3)) if self.attention_pool is None else self.attention_pool(x)

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        return count_flops(self, blank_image(self, self.image_spec))
