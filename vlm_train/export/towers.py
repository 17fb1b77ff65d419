"""Our dual encoders as `model` nodes of a config, and what another format has no place for.

A node has the keys of conf/model/*.yaml without `tokenizer`: reading a foreign architecture makes one, and the same
node builds the model now and stands in the config.yaml of the imported run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.base import Connector
from vlm_train.models.connectors.linear import LinearConnector, MLPConnector
from vlm_train.models.connectors.perceiver import PerceiverConnector
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.layers import Attention, Block, QuickGELU
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import ImageSpec, TextSpec

TARGET = "_target_"
MODEL = "vlm_train.models.dual_encoder.DualEncoder"
VISION = "vlm_train.models.vision.vit.VisionTransformer"
TEXT = "vlm_train.models.text.transformer.TextTransformer"
GENERATIVE = "vlm_train.models.generative.GenerativeModel"
LANGUAGE = "vlm_train.models.language.CausalLanguageModel"
CONNECTORS: dict[str, type[Connector]] = {
    f"{each.__module__}.{each.__qualname__}": each for each in (MLPConnector, LinearConnector, PerceiverConnector)
}

Node = dict[str, Any]


def clip_node(*, embed_dim: int, vision: Mapping[str, Any], text: Mapping[str, Any]) -> Node:
    """A model node with the projections of CLIP. `vision` and `text`: keywords of our towers."""
    return {TARGET: MODEL, "embed_dim": embed_dim, "vision": {TARGET: VISION, **vision}, "text": {TARGET: TEXT, **text}}


def siglip_node(*, embed_dim: int, vision: Mapping[str, Any], text: Mapping[str, Any]) -> Node:
    """A model node with the heads of SigLIP: attention pooling of patches, and the last position of a text."""
    node = clip_node(
        embed_dim=embed_dim,
        vision={**vision, "pool": "map", "pre_norm": False},
        text={**text, "pool": "last", "causal": False},
    )
    return {**node, "image_projection": "none", "text_bias": True}


def image_node(spec: ImageSpec) -> Node:
    """The `image` of a vision node."""
    return {"size": spec.size, "mean": list(spec.mean), "std": list(spec.std), "resize": spec.resize}


def generative_node(
    *,
    vision: Mapping[str, Any],
    connector: type[Connector],
    options: Mapping[str, Any],
    text: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> Node:
    """A node of a generative model. `vision`: keywords of our tower; `options`: of the connector; `text`: the
    architecture of a language model; `rest`: further keywords of `GenerativeModel`."""
    name = next(name for name, each in CONNECTORS.items() if each is connector)
    return {
        TARGET: GENERATIVE,
        **rest,
        "vision": {TARGET: VISION, **vision},
        "connector": {TARGET: name, "_partial_": True, **options},
        "text": {TARGET: LANGUAGE, "architecture": dict(text)},
    }


def model_from(node: Mapping[str, Any], spec: TextSpec) -> DualEncoder | GenerativeModel:
    """The model of a node, with initial weights. Raises ConfigError for sizes that do not fit."""
    rest = {key: value for key, value in node.items() if key not in (TARGET, "vision", "text", "connector")}
    vision, text = ({k: v for k, v in node[tower].items() if k != TARGET} for tower in ("vision", "text"))
    tower = VisionTransformer(**vision)
    if node.get(TARGET) == GENERATIVE:
        options = {key: value for key, value in node["connector"].items() if key not in (TARGET, "_partial_")}
        connector = partial(CONNECTORS[node["connector"][TARGET]], **options)
        return GenerativeModel(vision=tower, connector=connector, text=CausalLanguageModel(spec=spec, **text), **rest)
    return DualEncoder(vision=tower, text=TextTransformer(spec=spec, **text), **rest)


def shape_of(blocks: nn.ModuleList) -> dict[str, Any]:
    """What our towers' constructors were given for these blocks: sizes, activation, epsilon."""
    block = blocks[0]
    assert isinstance(block, Block) and isinstance(block.attention, Attention)
    activation: Any = block.mlp.activation
    is_quick = isinstance(activation, QuickGELU)
    return {
        "width": block.mlp.fc1.in_features,
        "num_layers": len(blocks),
        "num_heads": block.attention.num_heads,
        "mlp_dim": block.mlp.fc1.out_features,
        "activation": "quick_gelu" if is_quick else {"none": "gelu", "tanh": "gelu_tanh"}[activation.approximate],
        "norm_eps": block.norm1.eps,
    }


def towers_of(model: DualEncoder, target: str) -> tuple[VisionTransformer, TextTransformer]:
    """The two transformers of a model. Raises ConfigError, naming them, where it is made of others, or pads pictures,
    which no processor of an image-text model does as we do."""
    vision, text = model.vision, model.text
    if not isinstance(vision, VisionTransformer) or not isinstance(text, TextTransformer):
        names = f"vision {type(vision).__name__}, text {type(text).__name__}"
        raise not_expressible(target, [(names, False, "VisionTransformer and TextTransformer")])
    if model.image_spec.resize == "pad":
        raise not_expressible(target, [("resize=pad", False, "shortest or squash")])
    return vision, text


def parts_of(model: DualEncoder) -> dict[str, Any]:
    """The choices of a model that a format may have no place for, by the key of a config that makes them."""
    vision, text = towers_of(model, "another library")
    return {
        "vision.pool": vision.pool,
        "vision.pre_norm": vision.pre_norm is not None,
        "text.pool": text.pool,
        "text.causal": text.causal,
        "image_projection": "none" if model.image_projection is None else "linear",
        "text_bias": model.text_projection.bias is not None,
    }


def require(target: str, parts: Mapping[str, Any], allowed: Mapping[str, Any]) -> None:
    """Refuses a model with other choices than `allowed`. Raises ConfigError that names each of them."""
    rows = [(f"{key}={parts[key]}", parts[key] == value, f"{value}") for key, value in allowed.items()]
    if not all(fits for _, fits, _ in rows):
        raise not_expressible(target, rows)


def not_expressible(target: str, rows: Iterable[tuple[str, bool, str]], *, remedy: str | None = None) -> ConfigError:
    """The refusal of an export; `rows`: (part with its value, whether the target holds it, what it would hold)."""
    wrong = {got: allowed for got, fits, allowed in rows if not fits}
    return ConfigError(
        f"{target} has no model that holds these towers exactly",
        got="; ".join(wrong),
        allowed="; ".join(f"{allowed} instead of {got}" for got, allowed in wrong.items()),
        remedy=remedy
        or "train with model=clip_* or model=siglip_* to export; other models are used through `vlm-train predict`",
    )


def not_readable(source: str, parts: Iterable[str], *, allowed: str | None = None) -> ConfigError:
    """The refusal of an import: parts of a foreign architecture that our towers have no place for."""
    return ConfigError(
        f"{source} has parts that our towers do not have",
        got="; ".join(parts),
        allowed=allowed or "CLIP with a vision transformer of its own; SigLIP of fixed resolution",
        remedy="use its towers through HuggingFaceVision, TimmVision or HuggingFaceText",
    )
