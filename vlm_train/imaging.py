"""Colours of a batch of pictures, on whatever device the batch is.

One function for two places: workers call it on a processor, and where there is a GPU the trainer calls it there with
the factors that the workers drew. What it makes of a picture depends on that picture alone, bit for bit: every step is
element by element, and the only sum is one of integers, which no order of adding can change.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_UNIT = 256  # a grey level in the sum


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast (about the mean grey of the picture) and saturation (about the grey of each pixel), in this
    order, as torchvision defines them; factors of 1 change nothing, a saturation of 0 leaves grey.

    Args:
        images: [B, 3, H, W] uint8 RGB, any memory format.
        factors: [B, 3] float32 on the same device: brightness, contrast, saturation, each at least 0.

    Returns:
        [B, 3, H, W] uint8.
    """
    brightness, contrast, saturation = factors.float()[..., None, None, None].unbind(1)
    values = images.to(torch.float32, memory_format=torch.contiguous_format).mul_(brightness).clamp_(0, 255)
    mean = (_grey(values) * _UNIT).round_().to(torch.int64).sum((1, 2, 3), keepdim=True)
    mean = (mean.double() / (_UNIT * images[0, 0].numel())).float()
    values = values.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 255)
    grey = _grey(values)
    return values.sub_(grey).mul_(saturation).add_(grey).clamp_(0, 255).round_().to(torch.uint8)


def _grey(values: Tensor) -> Tensor:
    """[B, 1, H, W]. Written out: a matrix product may be rounded to TF32 on a GPU."""
    red, green, blue = values.split(1, dim=1)
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
