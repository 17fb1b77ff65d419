"""open_clip's `model_cfg` and `preprocess_cfg` <-> the nodes of our configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_train.export import openclip_timm
from vlm_train.export.certificate import Trained
from vlm_train.export.towers import (
    Node,
    clip_node,
    image_node,
    not_expressible,
    not_readable,
    parts_of,
    require,
    shape_of,
    siglip_node,
    towers_of,
)
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.types import CLIP_MEAN, CLIP_STD, ImageSpec, TextSpec

NAME = "open_clip"
CONTEXT = 77
NORM_EPS = 1e-5  # torch's, where norm_kwargs says nothing

# What open_clip assumes where a config is silent: keys that we read, ...
VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
# ... keys that must say this, because our towers have nothing else, ...
PLAIN_BLOCK = {
    "ls_init_value": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
    "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "final_ln_after_pool": False,
}  # fmt: skip
PLAIN_VISION = {**PLAIN_BLOCK, "attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable",
                "pool_type": "tok"}  # fmt: skip
PLAIN_TEXT = {**PLAIN_BLOCK, "embed_cls": False, "proj_type": "linear", "hf_model_name": None, "tokenizer_mode": None}
PLAIN_MODEL = {"multimodal_cfg": None}
# ... and keys that change no feature.
OTHER_VISION = {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens", "block_type"}
OTHER_TEXT = {"output_tokens", "block_type", "pad_id", "hf_tokenizer_name", "tokenizer_kwargs", "hf_proj_type",
              "hf_pooler_type", "hf_model_pretrained"}  # fmt: skip
OTHER_MODEL = {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"}
READ_TOWER = {"act_kwargs", "norm_kwargs"}
READ_TEXT = {*TEXT, *READ_TOWER, "pool_type", "eos_id", "no_causal_mask", "proj_bias"}
READ_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}


def config_of(trained: Trained, *, tokenizer_name: str) -> dict[str, Any]:
    """The content of open_clip_config.json for a model. Raises ConfigError that names what has no place in it."""
    model = trained.model
    vision, text = towers_of(model, NAME)
    is_siglip = vision.pool == "map"
    quick = {key for key, tower in (("vision", vision), ("text", text)) if _is_quick(shape_of(tower.blocks))}
    if is_siglip:
        require(NAME, parts_of(model), {"vision.pre_norm": False, "image_projection": "none"})
        tower = openclip_timm.tower_of(vision, NAME)
    else:
        require(NAME, parts_of(model), {"vision.pool": "cls", "vision.pre_norm": True, "image_projection": "linear"})
        if len(quick) == 1:
            part = f"{quick.pop()}.activation=quick_gelu"
            raise not_expressible(NAME, [(part, False, "the same activation in both towers")])
        tower = _their_vision(shape_of(vision.blocks), vision.image_spec.size, vision.patch_size)
    config = {
        "embed_dim": model.embed_dim,
        "quick_gelu": "text" in quick,
        "custom_text": is_siglip,
        "vision_cfg": tower,
        "text_cfg": {**_their_text(model), "hf_tokenizer_name": tokenizer_name},
    }
    if trained.logit_bias is not None:
        config["init_logit_bias"] = float(trained.logit_bias)
    image = model.image_spec
    images = {"size": image.size, "mode": "RGB", "mean": list(image.mean), "std": list(image.std),
              "interpolation": "bicubic", "resize_mode": image.resize, "fill_color": 0}  # fmt: skip
    return {"model_cfg": config, "preprocess_cfg": images}


def _is_quick(shape: Mapping[str, Any]) -> bool:
    return bool(shape["activation"] == "quick_gelu")


def _their_vision(shape: Mapping[str, Any], image_size: int, patch_size: int) -> dict[str, Any]:
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "layers": shape["num_layers"],
        "width": shape["width"],
        "head_width": shape["width"] // shape["num_heads"],
        **_their_block(shape),
    }


def _their_text(model: DualEncoder) -> dict[str, Any]:
    _, text = towers_of(model, NAME)
    spec, shape = text.text_spec, shape_of(text.blocks)
    if (text.pool, text.causal) not in {("eos", True), ("last", True), ("last", False)}:
        part = f"text.pool={text.pool}, text.causal={text.causal}"
        raise not_expressible(NAME, [(part, False, "eos and True, or last")])
    pooling = {"pool_type": "last"}
    if text.pool == "eos":
        is_highest = spec.eos_id == spec.vocab_size - 1
        pooling = {"pool_type": "argmax"} if is_highest else {"pool_type": "eos"}
    return {
        "context_length": spec.context_length,
        "vocab_size": spec.vocab_size,
        "layers": shape["num_layers"],
        "width": shape["width"],
        "heads": shape["num_heads"],
        "eos_id": spec.eos_id,
        "pad_id": spec.pad_id,
        "no_causal_mask": not text.causal,
        "proj_bias": model.text_projection.bias is not None,
        **pooling,
        **_their_block(shape),
    }


def _their_block(shape: Mapping[str, Any]) -> dict[str, Any]:
    width, mlp_dim = shape["width"], shape["mlp_dim"]
    ratio = mlp_dim / width
    found: dict[str, Any] = {"mlp_ratio": ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width}
    if shape["activation"] == "gelu_tanh":
        found["act_kwargs"] = {"approximate": "tanh"}
    return found if shape["norm_eps"] == NORM_EPS else {**found, "norm_kwargs": {"eps": shape["norm_eps"]}}


def node_of(config: Mapping[str, Any], images: Mapping[str, Any]) -> tuple[Node, TextSpec, list[str]]:
    """The model node of a `model_cfg` with a `preprocess_cfg`, what its text tower reads, and notes.

    Raises:
        ConfigError: parts that our towers do not have, each by its name.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    is_timm = "timm_model_name" in vision
    is_quick = bool(config.get("quick_gelu"))
    wrong = _foreign_keys(config, "", PLAIN_MODEL, READ_MODEL | OTHER_MODEL)
    wrong += _foreign_keys(text, "text_cfg.", PLAIN_TEXT, READ_TEXT | OTHER_TEXT) + _foreign_text(text)
    wrong += [] if is_timm else _foreign_vision(vision)
    wrong += [f"resize_mode={images['resize_mode']}"] if images.get("resize_mode") == "longest" else []
    if wrong:
        raise not_readable("this architecture of open_clip", wrong)
    image, notes = _image_spec(vision, images)
    embed_dim = config["embed_dim"]
    theirs = {**TEXT, **text}
    ours = {**_our_tower(theirs, is_quick), "num_heads": theirs["heads"]}
    spec = _spec_of(theirs)
    if is_timm:
        trunk = openclip_timm.keywords_of(vision, embed_dim)
        picture = {**image_node(image), "size": trunk.pop("image_size")}
        node = siglip_node(embed_dim=embed_dim, vision={"image": picture, **trunk}, text=ours)
    else:
        node = clip_node(embed_dim=embed_dim, vision=_our_vision({**VISION, **vision}, image, is_quick), text=ours)
    node["text"] |= {"pool": "last" if spec.pad_to_max else "eos", "causal": not theirs.get("no_causal_mask", False)}
    return {**node, "text_bias": bool(theirs.get("proj_bias"))}, spec, notes


def _foreign_keys(node: Mapping[str, Any], where: str, plain: Mapping[str, Any], other: set[str]) -> list[str]:
    """Keys of a config that ask for what our towers are not."""
    return [
        f"{where}{key}={value}"
        for key, value in node.items()
        if (key in plain and value not in (plain[key], None)) or (key not in plain and key not in other)
    ]


def _foreign_vision(vision: Mapping[str, Any]) -> list[str]:
    if isinstance(vision.get("layers"), list | tuple):
        return [f"vision_cfg.layers={vision['layers']} (ModifiedResNet)"]
    read = {*VISION, *READ_TOWER, *OTHER_VISION}
    neutral = {key for key in vision if key.startswith("timm_")}
    wrong = _foreign_keys(vision, "vision_cfg.", PLAIN_VISION, read | neutral)
    square = {key: vision.get(key, 0) for key in ("image_size", "patch_size")}
    return wrong + [f"vision_cfg.{key}={value}" for key, value in square.items() if not isinstance(value, int)]


def _foreign_text(text: Mapping[str, Any]) -> list[str]:
    pool, is_free = text.get("pool_type", "argmax"), text.get("no_causal_mask", False)
    wrong = [] if pool in ("argmax", "eos", "last") else [f"text_cfg.pool_type={pool}"]
    return wrong + (["text_cfg.no_causal_mask=True with unmasked padding"] if is_free and pool != "last" else [])


def _image_spec(vision: Mapping[str, Any], images: Mapping[str, Any]) -> tuple[ImageSpec, list[str]]:
    kernel = images.get("interpolation", "bicubic")
    notes = [] if kernel == "bicubic" else [f"its images are resized with kernel {kernel}, ours bicubically"]
    resize: Any = images.get("resize_mode") or "shortest"
    spec = ImageSpec(
        size=vision.get("image_size", VISION["image_size"]),
        mean=tuple(images.get("mean") or CLIP_MEAN),
        std=tuple(images.get("std") or CLIP_STD),
        resize=resize,
    )
    return spec, notes


def _spec_of(text: Mapping[str, Any]) -> TextSpec:
    pool, vocab_size = text.get("pool_type", "argmax"), text["vocab_size"]
    return TextSpec(
        vocab_size=vocab_size,
        context_length=text["context_length"],
        pad_id=text.get("pad_id", 0),
        bos_id=None,
        eos_id=text.get("eos_id", 2) if pool == "eos" else vocab_size - 1,
        pad_to_max=pool == "last",
    )


def _our_tower(tower: Mapping[str, Any], is_quick: bool) -> dict[str, Any]:
    is_tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "width": tower["width"],
        "num_layers": tower["layers"],
        "mlp_dim": int(tower["width"] * tower["mlp_ratio"]),
        "activation": "quick_gelu" if is_quick else "gelu_tanh" if is_tanh else "gelu",
        "norm_eps": (tower.get("norm_kwargs") or {}).get("eps", NORM_EPS),
    }


def _our_vision(vision: Mapping[str, Any], image: ImageSpec, is_quick: bool) -> dict[str, Any]:
    return {
        "image": image_node(image),
        "patch_size": vision["patch_size"],
        **_our_tower(vision, is_quick),
        "num_heads": vision["width"] // vision["head_width"],
    }
