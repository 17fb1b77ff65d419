"""What every image tower shares: the image it wants, and turning uint8 pixels into normalised floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.types import ImageSpec

RESIZES = ("shortest", "squash", "pad")


def as_image_spec(image: ImageSpec | Mapping[str, Any]) -> ImageSpec:
    """`image` as an ImageSpec; a mapping has its keys (`size`, and optionally `mean`, `std`, `resize`).

    Raises:
        ConfigError: a key that ImageSpec does not have, no `size`, or another `resize` than those it has.
    """
    if isinstance(image, ImageSpec):
        return image
    allowed = tuple(ImageSpec.__dataclass_fields__)
    if "size" not in image or any(key not in allowed for key in image):
        raise ConfigError(
            "the `image` of a vision tower has a wrong or missing key",
            got=dict(image),
            allowed=f"size (required), {', '.join(allowed[1:])}",
            remedy="image: {size: 224}",
        )
    values: dict[str, Any] = {key: tuple(value) if key in ("mean", "std") else value for key, value in image.items()}
    if (resize := values.get("resize", RESIZES[0])) not in RESIZES:
        raise ConfigError("the `image` of a vision tower has an unknown `resize`", got=resize,
                          allowed=", ".join(RESIZES), remedy="image: {size: 224, resize: squash}")  # fmt: skip
    return ImageSpec(**values)


class Normalize(nn.Module):
    """uint8 RGB [B, 3, S, S] -> floats (x / 255 - mean) / std, as one multiply-add on the images' own device."""

    scale: Tensor
    shift: Tensor

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        self.image = image
        self.register_buffer("scale", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.empty(3, 1, 1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the buffers; they are in no checkpoint, so they must be filled again after a meta build."""
        mean = torch.tensor(self.image.mean, dtype=torch.float64)
        std = torch.tensor(self.image.std, dtype=torch.float64)
        self.scale.copy_((1 / (255 * std)).view(3, 1, 1))
        self.shift.copy_((-mean / std).view(3, 1, 1))

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 -> [B, 3, S, S] in the buffers' dtype."""
        return torch.addcmul(self.shift, images_B3SS.to(self.scale.dtype), self.scale)


def blank_image(module: nn.Module, image: ImageSpec) -> Tensor:
    """One image of zeros [1, 3, S, S] where the weights of `module` are."""
    like = next(module.parameters())
    return torch.zeros(1, 3, image.size, image.size, device=like.device, dtype=like.dtype)
