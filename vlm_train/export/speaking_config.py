"""Parts of configs that every class of transformers for generative models has: an image tower and a language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_train.export.hf import their_tower
from vlm_train.export.towers import shape_of
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.vision.pretrained import HuggingFaceVision
from vlm_train.models.vision.vit import VisionTransformer

CLIP, SIGLIP = {"pool": "cls", "pre_norm": True}, {"pool": "mean", "pre_norm": False}
"""What a tower of ours is like whose tokens are those of CLIP's or of SigLIP's."""

Rows = list[tuple[str, bool, str]]
"""See `towers.not_expressible`."""


def model_rows(model: GenerativeModel, *, allowed: tuple[Mapping[str, Any], ...]) -> Rows:
    """Whether pictures are one image each, and the tokens of the image tower those of one of `allowed`, CLIP and
    SIGLIP."""
    max_tiles = model.dialogue.max_tiles
    return [(f"max_tiles={max_tiles}", max_tiles == 1, "1"), _tower_row(model.vision, allowed)]


def _tower_row(vision: Any, allowed: tuple[Mapping[str, Any], ...]) -> tuple[str, bool, str]:
    if type(vision) is VisionTransformer:
        kind: dict[str, Any] = {"pool": vision.pool, "pre_norm": vision.pre_norm is not None}
        return f"vision {kind}", kind in allowed, " or ".join(str(each) for each in allowed)
    if type(vision) is not HuggingFaceVision:
        return f"vision {type(vision).__name__}", False, "VisionTransformer or HuggingFaceVision"
    kind = CLIP if vision.has_class_token else SIGLIP
    return f"vision {vision.network.config.model_type}", kind in allowed, "siglip_vision_model"  # type: ignore[union-attr]


def vision_keys(vision: VisionTransformer) -> dict[str, Any]:
    """The keys of a tower's config for a tower of ours."""
    return their_tower(shape_of(vision.blocks)) | {
        "num_hidden_layers": vision.num_layers,
        "image_size": vision.image_spec.size,
        "patch_size": vision.patch_size,
    }


def text_config(model: GenerativeModel, image_id: int) -> Any:
    """The config of its language model, which may get a row more, for images."""
    text: Any = copy.deepcopy(model.text.network.config)
    text.vocab_size = max(model.text.vocab_size, image_id + 1)
    return text


def architecture_of(text: Any) -> dict[str, Any]:
    """The `architecture` of a language model of ours for such a config."""
    left_out = ("vocab_size", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
    return {key: value for key, value in text.to_diff_dict().items() if key not in left_out}


def grown(tensor: Tensor, shape: torch.Size) -> Tensor:
    """With rows of the mean below it: as an embedding they are never read, and as logits never the largest."""
    missing = shape[0] - len(tensor) if shape else 0
    return torch.cat([tensor, tensor.mean(dim=0, keepdim=True).expand(missing, -1)]) if missing else tensor
