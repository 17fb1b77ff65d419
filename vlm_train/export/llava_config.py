"""The shape of transformers' LLaVA: which models of ours it holds, and which of its configs are models of ours.

It reads a layer of its tower without the last norm, so a model of ours must have a `feature_layer`. What lies behind
that layer our model does not have; in a folder of ours it changes nothing, so that layers have the same numbers on both
sides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

from vlm_train.export.hf import FROM_TRANSFORMERS, our_tower
from vlm_train.export.speaking_config import (
    CLIP,
    SIGLIP,
    architecture_of,
    grown,
    model_rows,
    text_config,
    vision_keys,
)
from vlm_train.export.towers import Node, generative_node, image_node, not_expressible, not_readable
from vlm_train.models.connectors.linear import LinearConnector, MLPConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import FAMILIES, num_positions
from vlm_train.models.vision.pretrained import TOKEN_TOWERS, HuggingFaceVision
from vlm_train.types import ImageSpec

FAMILY: Final = "llava"
_SECOND = "model.multi_modal_projector.linear_2."
_REMEDY = (
    "train with VisionTransformer (pool=cls with pre_norm, or pool=mean without) or HuggingFaceVision of CLIP or "
    "SigLIP, MLPConnector of 2 layers or LinearConnector, and feature_layer=-2 or -1, or as Idefics2 with "
    "PerceiverConnector; other models answer through `vlm-train predict`"
)
_ALLOWED = (
    f"a tower of CLIP or SigLIP, two linears with biases, a language model of {', '.join(FAMILIES)}, one feature layer"
)


def check(model: GenerativeModel) -> None:
    """Refuses a model that LLaVA does not hold. Raises ConfigError that names each part that stands in the way."""
    connector, resize = model.connector, model.image_spec.resize
    linears = f" of {len(connector.layers[::2])} layers" if isinstance(connector, MLPConnector) else ""
    rows = [
        *model_rows(model, allowed=(CLIP, SIGLIP)),
        (f"feature_layer={model.feature_layer}", model.feature_layer is not None, "a layer, without the last norm"),
        (f"connector {type(connector).__name__}{linears}",
         isinstance(connector, MLPConnector) and len(connector.layers[::2]) in (1, 2),
         "MLPConnector of 2 layers, or LinearConnector"),
        (f"resize={resize}", resize in ("shortest", "squash"), "shortest or squash"),
    ]  # fmt: skip
    if not all(fits for _, fits, _ in rows):
        raise not_expressible("LlavaForConditionalGeneration of transformers", rows, remedy=_REMEDY)


def config_of(model: GenerativeModel, image_id: int) -> LlavaConfig:
    """See `Kind.config_of`."""
    check(model)
    assert model.feature_layer is not None
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        dtype="float32",
        vision_config=_vision_config(model.vision),
        text_config=text_config(model, image_id),
        image_token_index=image_id,
        image_seq_length=model.tokens_per_image,
        vision_feature_layer=model.feature_layer,
        vision_feature_select_strategy=strategy_of(model),
        projector_hidden_act="gelu" if len(model.connector.layers) > 1 else "linear",  # type: ignore[arg-type]
        tie_word_embeddings=model.text.is_tied,
    )


def strategy_of(model: GenerativeModel) -> Literal["default", "full"]:
    """`default` leaves a class token out, `full` takes what there is."""
    return "default" if model.first_patch else "full"


def _vision_config(vision: Any) -> Any:
    if isinstance(vision, HuggingFaceVision):
        config: Any = copy.deepcopy(vision.network.config)
        if config.model_type == "siglip_vision_model":
            config.vision_use_head = False
        return config
    keys = vision_keys(vision)
    return CLIPVisionConfig(**keys) if vision.has_class_token else SiglipVisionConfig(**keys, vision_use_head=False)


def node_of(config: Any, image: ImageSpec) -> Node:
    """The model node of the shape that a LlavaConfig describes. Raises ConfigError."""
    vision, text = config.vision_config, config.text_config
    is_clip, strategy = vision.model_type == "clip_vision_model", config.vision_feature_select_strategy
    layer, activation = config.vision_feature_layer, getattr(vision, "hidden_act", None)
    fits = {
        f"vision_config.model_type={vision.model_type}": vision.model_type in TOKEN_TOWERS,
        f"text_config.model_type={text.model_type}": text.model_type in FAMILIES,
        f"vision_config.hidden_act={activation}": activation in FROM_TRANSFORMERS,
        f"vision_feature_layer={layer}": isinstance(layer, int),
        f"{vision.model_type} with vision_feature_select_strategy={strategy}": is_clip or strategy == "full",
        f"projector_hidden_act={config.projector_hidden_act}": config.projector_hidden_act in ("gelu", "linear"),
        "multimodal_projector_bias=False": config.multimodal_projector_bias,
        f"num_channels={getattr(vision, 'num_channels', 3)}": getattr(vision, "num_channels", 3) == 3,
        f"image_size={vision.image_size}, processor {image.size}": vision.image_size == image.size,
    }
    if not all(fits.values()):
        wrong = [part for part, fit in fits.items() if not fit]
        raise not_readable("this LLaVA", wrong, allowed=_ALLOWED)
    return generative_node(
        vision={"image": image_node(image), "patch_size": vision.patch_size, **our_tower(vision),
                **(CLIP if is_clip else SIGLIP)},
        connector=MLPConnector if config.projector_hidden_act == "gelu" else LinearConnector,
        options={},
        text=architecture_of(text),
        rest={
            "context_length": num_positions(text),
            "max_images": 1,
            "drop_class_token": strategy == "default",
            "feature_layer": feature_layer(config),
        },
    )  # fmt: skip


def feature_layer(config: Any) -> int:
    """The layer that is read, counted from behind."""
    layer: int = config.vision_feature_layer
    return layer if layer < 0 else layer - config.vision_config.num_hidden_layers - 1


def filled(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], config: Any) -> dict[str, Tensor]:
    """The tensors of a model of ours with those that LLaVA has beside them: rows for the token of images, where a
    connector is one linear a second one that changes nothing, and layers that are not read, which change nothing."""
    result = {name: grown(tensor, shapes[name]) for name, tensor in state.items()}
    for name, shape in shapes.items():
        if name in result:
            continue
        is_second = name == f"{_SECOND}weight"
        assert is_second or name == f"{_SECOND}bias" or is_unread(name, config), name
        is_norm = "norm" in name and name.endswith("weight")
        result[name] = torch.eye(shape[0]) if is_second else torch.full(shape, float(is_norm))
    return result


def read_part(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """What LLaVA reads of its tensors. Raises ConfigError for a second linear that is one behind another."""
    left_out = {name for name in state if is_unread(name, config)}
    if config.projector_hidden_act == "linear":
        weight, bias = state[f"{_SECOND}weight"], state[f"{_SECOND}bias"]
        if bias.any() or not torch.equal(weight, torch.eye(*weight.shape)):
            raise not_readable("this LLaVA", ["two linears with nothing between them"], allowed=_ALLOWED)
        left_out |= {f"{_SECOND}weight", f"{_SECOND}bias"}
    return {name: tensor for name, tensor in state.items() if name not in left_out}


def is_unread(name: str, config: Any) -> bool:
    """Whether no token goes through a tensor of LLaVA's tower on its way to the layer that is read."""
    found = re.match(r"model\.vision_tower\.(?:encoder\.layers\.(\d+)|post_layernorm|head)\.", name)
    num_read = config.vision_config.num_hidden_layers + 1 + feature_layer(config)
    return found is not None and (found[1] is None or int(found[1]) >= num_read)
