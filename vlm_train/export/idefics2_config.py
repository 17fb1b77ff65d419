"""The shape of transformers' Idefics2: which models of ours it holds, and which of its configs are models of ours.

It reads SigLIP's tower behind its last norm, so a model of ours has no `feature_layer`. It finds the position of a
patch by its share of the image, and where an image is a square of the size of the tower these are the positions of a
grid. Not of every grid: with 19, 25 or 29 patches a side, and more, rounding gives two patches the same, and such are
refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import Idefics2Config
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from vlm_train.export.hf import BICUBIC, FROM_TRANSFORMERS, our_tower
from vlm_train.export.speaking_config import (
    SIGLIP,
    architecture_of,
    grown,
    model_rows,
    text_config,
    vision_keys,
)
from vlm_train.export.towers import Node, generative_node, image_node, not_expressible, not_readable
from vlm_train.models.connectors.perceiver import NORM_EPS, PerceiverConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import FAMILIES, num_positions
from vlm_train.models.vision.pretrained import HuggingFaceVision
from vlm_train.types import ImageSpec

FAMILY: Final = "idefics2"
_REMEDY = (
    "train with VisionTransformer (pool=mean without pre_norm) or HuggingFaceVision of SigLIP, images squashed to "
    "squares, feature_layer=null and PerceiverConnector with the language model's intermediate_size as mlp_dim; other "
    "models answer through `vlm-train predict`"
)
_ALLOWED = (
    f"a tower as SigLIP's, a perceiver with SiLU and epsilon {NORM_EPS}, a language model of {', '.join(FAMILIES)}"
)
OTHER_GRID = "a grid in which transformers gives no two patches one position, such as 14, 16, 24, 27 or 32 a side"
_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
           "hidden_act", "layer_norm_eps")  # fmt: skip


def check(model: GenerativeModel) -> None:
    """Refuses a model that Idefics2 does not hold. Raises ConfigError that names each part that stands in the way."""
    text: Any = model.text.network.config
    connector, resize = model.connector, model.image_spec.resize
    rows = [
        *model_rows(model, allowed=(SIGLIP,)),
        (f"feature_layer={model.feature_layer}", model.feature_layer is None, "null, behind the last norm"),
        (f"connector {type(connector).__name__}", isinstance(connector, PerceiverConnector), "PerceiverConnector"),
        (f"resize={resize}", resize == "squash", "squash"),
        (f"hidden_act={text.hidden_act}", text.hidden_act == "silu", "silu, which the perceiver has"),
    ]
    side = math.isqrt(model.vision.num_patches)
    rows.append((f"{side} x {side} patches", has_grid(side), OTHER_GRID))
    if isinstance(connector, PerceiverConnector):
        mlp_dim = connector.project.gate.out_features
        wanted = f"mlp_dim={text.intermediate_size}, the language model's intermediate_size"
        rows.append((f"connector.mlp_dim={mlp_dim}", mlp_dim == text.intermediate_size, wanted))
    if not all(fits for _, fits, _ in rows):
        raise not_expressible("Idefics2ForConditionalGeneration of transformers", rows, remedy=_REMEDY)


def config_of(model: GenerativeModel, image_id: int) -> Idefics2Config:
    """See `Kind.config_of`."""
    check(model)
    vision, connector = model.vision, model.connector
    assert isinstance(connector, PerceiverConnector)
    if isinstance(vision, HuggingFaceVision):
        keys: dict[str, Any] = {key: getattr(vision.network.config, key) for key in _VISION}
    else:
        keys = vision_keys(vision)  # type: ignore[arg-type]
    attention: Any = connector.resampler.blocks[0].attention
    return Idefics2Config(
        architectures=["Idefics2ForConditionalGeneration"],
        dtype="float32",
        vision_config=keys,
        perceiver_config={
            "hidden_act": "silu",
            "hidden_size": model.text.width,
            "rms_norm_eps": NORM_EPS,
            "resampler_n_latents": connector.num_tokens,
            "resampler_depth": len(connector.resampler.blocks),
            "resampler_n_heads": attention.num_heads,
            "resampler_head_dim": attention.head_dim,
            "num_key_value_heads": attention.num_kv_heads,
        },
        text_config=text_config(model, image_id),
        image_token_id=image_id,
        tie_word_embeddings=model.text.is_tied,
    )


def node_of(config: Any, processor: Any) -> Node:
    """See `Kind.node_of`."""
    vision, text, perceiver = config.vision_config, config.text_config, config.perceiver_config
    fits = {
        f"text_config.model_type={text.model_type}": text.model_type in FAMILIES,
        f"text_config.hidden_act={getattr(text, 'hidden_act', None)}": getattr(text, "hidden_act", None) == "silu",
        f"vision_config.hidden_act={vision.hidden_act}": vision.hidden_act in FROM_TRANSFORMERS,
        f"perceiver_config.hidden_act={perceiver.hidden_act}": perceiver.hidden_act == "silu",
        f"perceiver_config.rms_norm_eps={perceiver.rms_norm_eps}": perceiver.rms_norm_eps == NORM_EPS,
        f"num_channels={vision.num_channels}": vision.num_channels == 3,
        f"image_size={vision.image_size}": isinstance(vision.image_size, int),
        f"patch_size={vision.patch_size}": isinstance(vision.patch_size, int),
    }
    if isinstance(vision.image_size, int) and isinstance(vision.patch_size, int):
        side = vision.image_size // vision.patch_size
        fits[f"{side} x {side} patches, of which some share a position"] = has_grid(side)
    if not all(fits.values()):
        raise not_readable("this Idefics2", [part for part, fit in fits.items() if not fit], allowed=_ALLOWED)
    image = ImageSpec(
        size=vision.image_size,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        resize="squash",
    )
    return generative_node(
        vision={"image": image_node(image), "patch_size": vision.patch_size, **our_tower(vision), **SIGLIP},
        connector=PerceiverConnector,
        options={
            "num_latents": perceiver.resampler_n_latents,
            "num_layers": perceiver.resampler_depth,
            "num_heads": perceiver.resampler_n_heads,
            "head_dim": perceiver.resampler_head_dim,
            "num_kv_heads": perceiver.num_key_value_heads,
            "mlp_dim": text.intermediate_size,
        },
        text={**architecture_of(text), "tie_word_embeddings": config.tie_word_embeddings},
        rest={"context_length": num_positions(text), "max_images": 1},
    )


@torch.no_grad()
def has_grid(side: int) -> bool:
    """Whether Idefics2 gives each of `side` x `side` patches the position of its own place, as transformers rounds."""
    embeddings = Idefics2VisionEmbeddings(Idefics2VisionConfig(hidden_size=1, image_size=side, patch_size=1))
    for parameter in embeddings.patch_embedding.parameters():
        nn.init.zeros_(parameter)
    numbers = torch.arange(side**2, dtype=torch.float32)[None, :, None]
    embeddings.position_embedding.weight.copy_(numbers[0])
    found = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))
    return torch.equal(found, numbers)


def notes_on(processor: Any) -> Sequence[str]:
    """See `Kind.notes_on`."""
    size: dict[str, Any] = dict(processor.size)
    notes = {
        "its images are resized by another kernel than bicubic, ours is": processor.resample != BICUBIC,
        "its images keep their shape and are of many sizes, ours are squares of one": "height" not in size,
        "its images are split into five, ours are one": bool(getattr(processor, "do_image_splitting", False)),
    }
    return [note for note, is_so in notes.items() if is_so]


def filled(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], config: Any) -> dict[str, Tensor]:
    """See `Kind.filled`: rows for the token of images."""
    return {name: grown(tensor, shapes[name]) for name, tensor in state.items()}
