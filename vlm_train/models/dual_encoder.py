"""Two towers into one space: the model of CLIP and SigLIP.

1. Pixels: uint8 images are normalised on their device; floats are taken as already normalised. In training a share of
   the patches may be left out.
2. Each tower makes one vector per item; a linear projection brings it to `embed_dim`.
3. Both are L2-normalised in fp32 (fp64 under fp64 parameters), whatever the precision before: the logits of a
   contrastive loss are differences of nearly equal cosines times up to 100.

Temperature and bias belong to the loss and live in the objective.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.layers import Linear, linear_flops
from vlm_train.models.patches import kept_patches, num_kept
from vlm_train.models.vision.image import Normalize
from vlm_train.types import Batch, ImageSpec, ModalitySpec, Outputs, TextSpec


class VisionTower(Protocol):
    """What a vision tower must offer: normalised pixels [B, 3, S, S] -> [B, out_dim].

    One that reads a modality in place of pixels says which in `reads`, a ModalitySpec.
    """

    image_spec: ImageSpec
    out_dim: int

    def __call__(self, pixels_B3SS: Tensor) -> Tensor:
        """One vector per image, not L2-normalised."""

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""


class PatchTower(VisionTower, Protocol):
    """A vision tower that can leave patches out."""

    num_patches: int

    def __call__(self, pixels_B3SS: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """Reads only the patches `kept_BK` int64, if given."""

    def forward_flops(self, num_kept: int | None = None) -> float:
        """Forward FLOPs of one image of which `num_kept` patches are read."""


class TextTower(Protocol):
    """What a text tower must offer: ids and mask [B, T] -> [B, out_dim]."""

    text_spec: TextSpec
    out_dim: int

    def __call__(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """One vector per text, not L2-normalised."""

    def forward_flops(self, num_tokens: float) -> float:
        """Forward FLOPs of one text of `num_tokens` tokens."""


class DualEncoder(nn.Module):
    """Image and text towers with projections to a common space.

    Args:
        vision: image tower.
        text: text tower.
        embed_dim: E, the width of the common space.
        image_projection: `linear` (CLIP: no bias) or `none` (SigLIP: the tower's width must be `embed_dim`).
        text_bias: whether the text projection has a bias (SigLIP) or not (CLIP).
        patch_dropout: share of the patches that the image tower does not read in training, another choice for each
            sample (FLIP); the time of the tower falls by about this share. Evaluation reads all.

    Raises:
        ConfigError: `image_projection: none` with a tower of another width; patches to leave out and a tower without.
    """

    outputs = frozenset({"image_features", "text_features"})
    forward_methods: tuple[str, ...] = ("encode_image", "encode_text")

    def __init__(
        self,
        *,
        vision: VisionTower,
        text: TextTower,
        embed_dim: int,
        image_projection: Literal["linear", "none"] = "linear",
        text_bias: bool = False,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_projection not in ("linear", "none") or (image_projection == "none" and vision.out_dim != embed_dim):
            raise ConfigError(
                "the image projection does not fit the vision tower",
                got=f"image_projection={image_projection}, vision width {vision.out_dim}, embed_dim={embed_dim}",
                allowed="linear; or none when the tower's width equals embed_dim",
                remedy=f"set model.image_projection=linear or model.embed_dim={vision.out_dim}",
            )
        if not 0 <= patch_dropout < 1 or (patch_dropout and not hasattr(vision, "num_patches")):
            raise ConfigError(
                "the image tower cannot leave out this share of its patches",
                got=f"patch_dropout={patch_dropout}, vision {type(vision).__name__}",
                allowed="0 <= patch_dropout < 1 with a VisionTransformer; 0 with any tower",
                remedy="set model.patch_dropout=0",
            )
        self.embed_dim, self.patch_dropout = embed_dim, patch_dropout
        reads: ModalitySpec | None = getattr(vision, "reads", None)
        self.modalities: tuple[ModalitySpec, ...] = () if reads is None else (reads,)
        self.image_field = "images" if reads is None else reads.name
        self.image_spec, self.text_spec = vision.image_spec, text.text_spec
        self.normalize = Normalize(self.image_spec)
        self.vision, self.text = vision, text
        self.image_projection = (
            Linear(vision.out_dim, embed_dim, bias=False, std=vision.out_dim**-0.5)
            if image_projection == "linear"
            else None
        )
        self.text_projection = Linear(text.out_dim, embed_dim, bias=text_bias, std=text.out_dim**-0.5)

    def forward(self, batch: Batch) -> Outputs:
        """Reads `images` (or `regions`: `image_field`), `text_ids`, `text_mask`; returns `image_features` and
        `text_features`, both [B, E].

        In training with `patch_dropout` also `draws`, which decide which patches are read.
        """
        return {
            "image_features": self.embed_images(batch),
            "text_features": self.encode_text(batch["text_ids"], batch["text_mask"]),
        }

    def embed_images(self, batch: Batch) -> Tensor:
        """Unit vectors [B, E] of a batch's images, in training of the patches that are read."""
        fields: Any = batch
        return self.encode_image(fields[self.image_field], self.kept(batch))

    def kept(self, batch: Batch) -> Tensor | None:
        """The patches [B, K] that are read of each image; None for all."""
        if not self._leaves_out:
            return None
        tower = cast(PatchTower, self.vision)
        return kept_patches(batch["draws"], num_patches=tower.num_patches, num_kept=self._num_kept(tower))

    @property
    def _leaves_out(self) -> bool:
        return self.training and self.patch_dropout > 0

    def _num_kept(self, tower: PatchTower) -> int:
        return num_kept(tower.num_patches, self.patch_dropout)

    def encode_image(self, images_B3SS: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """[B, 3, S, S], uint8 or already normalised floats -> unit vectors [B, E]; `kept_BK`: see `PatchTower`. A tower
        that reads another modality in place of pixels gets that."""
        pixels = self.pixels(images_B3SS)
        return self.project_image(
            self.vision(pixels) if kept_BK is None else cast(PatchTower, self.vision)(pixels, kept_BK)
        )

    def pixels(self, images_B3SS: Tensor) -> Tensor:
        """What the vision tower is fed.

        Raises:
            ConfigError: a batch of another shape than the tower reads.
        """
        size = self.image_spec.size
        shape = self.modalities[0].shape if self.image_field != "images" else (3, size, size)
        if images_B3SS.shape[1:] != shape:
            raise ConfigError(
                f"a batch of {self.image_field} does not have the shape that the vision tower reads",
                got=tuple(images_B3SS.shape),
                allowed=("B", *shape),
                remedy="build the data with the model's own image_spec and modalities",
            )
        return self.normalize(images_B3SS) if images_B3SS.dtype == torch.uint8 else images_B3SS

    def project_image(self, vector_BD: Tensor) -> Tensor:
        """The vision tower's [B, D] -> unit vectors [B, E]."""
        return unit_length(vector_BD if self.image_projection is None else self.image_projection(vector_BD))

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """ids [B, T] int64 and mask [B, T] bool -> unit vectors [B, E]."""
        return self.project_text(self.text(ids_BT, mask_BT))

    def project_text(self, vector_BD: Tensor) -> Tensor:
        """The text tower's [B, D] -> unit vectors [B, E]."""
        return unit_length(self.text_projection(vector_BD))

    def forward_flops(self, num_text_tokens: float) -> dict[str, float]:
        """Forward FLOPs of one sample by part (`vision`, `text`), 2 per multiply-add, as executed.

        Work that the towers skip in their last block (see `layers`), and in training with the patches that are left
        out, is not counted, so MFU is not flattered.
        """
        tower = cast(PatchTower, self.vision)
        vision = tower.forward_flops(self._num_kept(tower)) if self._leaves_out else self.vision.forward_flops()
        if self.image_projection is not None:
            vision += linear_flops(self.image_projection, 1)
        return {
            "vision": vision,
            "text": self.text.forward_flops(num_text_tokens) + linear_flops(self.text_projection, 1),
        }


def unit_length(features_BE: Tensor) -> Tensor:
    """Rows scaled to length 1, computed and returned in fp32, or in fp64 when given fp64."""
    wide = features_BE if features_BE.dtype == torch.float64 else features_BE.float()
    return F.normalize(wide, dim=-1)
