"""A transformer over what is no picture: depth, a spectrogram, readings over time.

Whatever it is lies on a rectangle, which is cut into patches of a shape of its own; the rest is a vision transformer
with a class token, as ImageBind (arXiv 2305.05665) has one for each modality. Its patches of sound overlap, ours do
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.layers import Activation, blocks_flops, first_of, make_blocks, prepend, run_blocks
from vlm_train.models.vision.vit import PatchEmbedding
from vlm_train.types import MODALITIES, ModalitySpec


class SignalTransformer(nn.Module):
    """Tower of one modality: [B, C, H, W], or [B, H, W] for a single channel -> one vector per sample [B, D].

    Args:
        reads: the modality: its `name`, one of `MODALITIES`, and the `shape` of one sample: [1, S, S] of depth (S the
            side of the image), [M, T] of audio and motion.
        patch: height and width of a patch; they divide those of the shape.
        width: D, also `out_dim`.
        num_layers: number of blocks.
        num_heads: attention heads per block, a divisor of `width`.
        mlp_dim: hidden width of the MLPs; 4 * width unless given.
        activation: see `layers.make_activation`.
        norm_eps: epsilon of the layer norms.
        mean, std: taken from every value, and what it is divided by, before anything else.

    Raises:
        ConfigError: a modality that nobody reads, a shape of other than two or three sizes, patches that do not fit.
    """

    def __init__(
        self,
        *,
        reads: Mapping[str, Any],
        patch: Sequence[int],
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int | None = None,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.reads = _spec(reads, patch)
        height, breadth = self.reads.shape[-2:]
        self.num_patches = (height // patch[0]) * (breadth // patch[1])
        self.out_dim, self.mean, self.std = width, mean, std
        num_channels = self.reads.shape[0] if len(self.reads.shape) == 3 else 1
        self.patch_embed = PatchEmbedding(
            patch_size=(patch[0], patch[1]), width=width, bias=True, num_channels=num_channels
        )
        self.class_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(self.num_patches + 1, width))
        self.blocks = make_blocks(
            num_layers,
            width=width,
            num_heads=num_heads,
            mlp_dim=4 * width if mlp_dim is None else mlp_dim,
            activation=activation,
            norm_eps=norm_eps,
        )
        self.post_norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Class token and positions start normal(0, 1/sqrt(D))."""
        for parameter in (self.class_token, self.position):
            nn.init.normal_(parameter, std=self.out_dim**-0.5)

    def forward(self, values_BCHW: Tensor) -> Tensor:
        """[B, *reads.shape] -> [B, D], not L2-normalised."""
        values_BCHW = (values_BCHW - self.mean) / self.std
        x_BPD = self.patch_embed(values_BCHW if values_BCHW.ndim == 4 else values_BCHW[:, None])
        x_BTD = prepend(self.class_token, x_BPD)
        x_BTD = x_BTD + self.position.to(x_BTD.dtype)
        return self.post_norm(run_blocks(self.blocks, x_BTD, read_B=first_of(x_BTD))).squeeze(1)

    def forward_flops(self) -> float:
        """Forward FLOPs of one sample."""
        patches = 2.0 * self.patch_embed.weight.numel() * self.num_patches
        return patches + blocks_flops(self.blocks, self.num_patches + 1, reads_one=True)


def _spec(reads: Mapping[str, Any], patch: Sequence[int]) -> ModalitySpec:
    name, shape = reads.get("name"), tuple(reads.get("shape", ()))
    fits = len(shape) in (2, 3) and len(patch) == 2 and min(*shape, *patch) > 0
    if name not in MODALITIES or set(reads) != {"name", "shape"} or not fits:
        raise ConfigError(
            "a tower cannot read this", got=f"reads={dict(reads)} patch={list(patch)}",
            allowed=f"{{name: one of {', '.join(MODALITIES)}, shape: two or three sizes}}, patch: two sizes",
            remedy="model.others.audio.reads={name: audio, shape: [128, 204]}",
        )  # fmt: skip
    if shape[-2] % patch[0] or shape[-1] % patch[1]:
        raise ConfigError(f"the patches of {name} do not fill its shape", got=f"shape {shape}, patch {list(patch)}",
                          allowed="a patch whose sides divide those of the shape",
                          remedy=f"model.others.{name}.patch=[...]")  # fmt: skip
    return ModalitySpec(name=str(name), shape=shape)
