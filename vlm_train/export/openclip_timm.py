"""The SigLIP image towers of timm, which open_clip takes by name: the name <-> the shape of our tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn

from vlm_train.export.towers import not_expressible, not_readable, shape_of
from vlm_train.models.vision.vit import VisionTransformer


def tower_of(vision: VisionTransformer, target: str) -> dict[str, Any]:
    """The `vision_cfg` that names the timm model of our tower's shape. Raises ConfigError where there is none."""
    size, patch = vision.image_spec.size, vision.patch_size
    wanted = {**shape_of(vision.blocks), "patch_size": patch, "image_size": size}
    for name in timm.list_models(f"*patch{patch}_siglip_{size}"):
        if _shape(_on_meta(name)) == wanted:
            return {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
                    "image_size": size}  # fmt: skip
    shape = ", ".join(f"{key}={value}" for key, value in wanted.items())
    raise not_expressible(target, [(f"vision.pool=map with {shape}", False, "the shape of a SigLIP tower of timm")])


def keywords_of(vision: Mapping[str, Any], embed_dim: int) -> dict[str, Any]:
    """Our tower's keywords, and `image_size`, for a `vision_cfg` that names a timm model. Raises ConfigError."""
    name, pool, proj = (vision.get(key) for key in ("timm_model_name", "timm_pool", "timm_proj"))
    wrong = [] if pool == "map" else [f"vision_cfg.timm_pool={pool}"]
    wrong += [] if proj == "none" else [f"vision_cfg.timm_proj={proj}"]
    network = _on_meta(str(name)) if not wrong and timm.is_model(str(name)) else None
    shape = None if network is None else _shape(network)
    if shape is None or shape["width"] != embed_dim:
        raise not_readable("this architecture of open_clip", [f"vision_cfg.timm_model_name={name}", *wrong])
    return shape


def without_download(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with a timm tower that fetches no weights of its own."""
    vision = config["vision_cfg"]
    return {
        **config,
        "vision_cfg": {**vision, "timm_model_pretrained": False} if "timm_model_name" in vision else vision,
    }


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return network


def _shape(network: nn.Module) -> dict[str, Any] | None:
    """What `shape_of` says of our tower, with `patch_size` and `image_size`; None for a network of another kind."""
    if not isinstance(network, TimmTransformer) or network.attn_pool is None:
        return None
    block: Any = network.blocks[0]
    plain = nn.Identity
    is_ours = (
        network.cls_token is None
        and getattr(network, "reg_token", None) is None
        and all(isinstance(part, plain) for part in (network.norm_pre, network.fc_norm, block.attn.q_norm, block.ls1))
        and isinstance(block.mlp.act, nn.GELU | GELUTanh)
    )
    if not is_ours:
        return None
    return {
        "width": network.embed_dim,
        "num_layers": len(network.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_dim": block.mlp.fc1.out_features,
        "activation": "gelu_tanh" if getattr(block.mlp.act, "approximate", "tanh") == "tanh" else "gelu",
        "norm_eps": block.norm1.eps,
        "patch_size": network.patch_embed.patch_size[0],
        "image_size": network.patch_embed.img_size[0],
    }
