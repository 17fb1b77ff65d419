"""Generative models of transformers, the same of ours with their weights, and what each is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from connector_cases import perceiver_names
from generative_toys import (
    IMAGE_TOKEN,
    PATCH,
    SIZE,
    TEXT,
    as_theirs,
    draw_weights,
    hugging_face_llava,
    make_model,
    make_text,
    renamed,
)
from torch import Tensor, nn

from vlm_train.models.connectors.perceiver import PerceiverConnector
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import Batch

Tensors = dict[str, Tensor]
VOCABULARY = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LARGE = 2 * SIZE  # 16 patches, of which pixel shuffle makes 4 tokens
TOWER: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": PATCH}  # fmt: skip
OURS: Any = {"width": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64, "activation": "gelu_tanh", "norm_eps": 1e-6,
             "pool": "mean", "pre_norm": False, "patch_size": PATCH}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """`names`: their weights or gradients by our names. `fields`: what they read of a batch. `twins`: changes of ours
    after which it is another model. `size`: of an image. `norms_in_fp32`: whether theirs does so in fp64 too."""

    theirs: Any
    ours: GenerativeModel
    names: Callable[[Tensors, nn.Module], Tensors]
    fields: Callable[[GenerativeModel, Batch], Tensors]
    twins: dict[str, Callable[[Any], None]]
    size: int
    norms_in_fp32: bool = False


def padded_fields(model: GenerativeModel, batch: Batch) -> Tensors:
    """As Idefics has its images: rows of as many, padded by black ones that it leaves out."""
    there = torch.arange(batch["images"].shape[1]) < batch["num_images"][:, None]
    pixels = model.normalize(batch["images"].flatten(0, 1)).unflatten(0, there.shape)
    return as_theirs(model, batch) | {"pixel_values": pixels * there[:, :, None, None, None]}


def idefics_names(connector: Callable[[Tensors], Tensors], state: Tensors, ours: nn.Module) -> Tensors:
    """The names of the parts that LLaVA has too are LLaVA's but for their prefix."""
    prefixes = {"model.vision_model.": "model.vision_tower.", "model.text_model.": "model.language_model."}
    alike = dict(state)
    for theirs, llavas in prefixes.items():
        alike = {name.replace(theirs, llavas): tensor for name, tensor in alike.items()}
    inner = {name.removeprefix("model.connector."): tensor for name, tensor in state.items() if "connector" in name}
    return renamed(alike, ours) | {f"connector.{name}": tensor for name, tensor in connector(inner).items()}


def without_last_norm(model: Any) -> None:
    model.vision.post_norm = nn.Identity()


def normed_again(model: Any) -> None:
    """CLIP's last norm, which LLaVA leaves out."""
    model.connector.register_forward_pre_hook(lambda _, inputs: nn.functional.layer_norm(inputs[0], (32,)))


def by_columns(model: Any) -> None:
    """The first shuffle of InternVL."""
    model.connector.register_forward_hook(lambda _, inputs, out: out.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))


def values_as_keys(model: Any) -> None:
    weight = model.connector.resampler.blocks[0].attention.key_value.weight
    weight.data = weight.data.roll(len(weight) // 2, dims=0)


def later_positions(model: Any) -> None:
    """Each patch has the position of the one before it."""
    model.vision.position.data = model.vision.position.data.roll(1, dims=0)


def llava(feature_layer: int) -> Case:
    theirs, ours = hugging_face_llava(feature_layer), make_model(feature_layer=feature_layer, max_images=3)
    return Case(theirs=theirs, ours=ours, names=renamed, fields=as_theirs, size=SIZE,
                twins={"a norm more": normed_again, "positions": later_positions})  # fmt: skip


def idefics2() -> Case:
    perceiver = {"hidden_size": 48, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
                 "resampler_head_dim": 12, "num_key_value_heads": 2}  # fmt: skip
    text = {**TEXT, "sliding_window": None, "rms_norm_eps": 1e-6}
    config = transformers.Idefics2Config(
        vision_config={**TOWER, "image_size": SIZE},
        perceiver_config=perceiver,
        text_config=transformers.MistralConfig(**text, **VOCABULARY),
        image_token_id=IMAGE_TOKEN,
    )
    connector = partial(
        PerceiverConnector, num_latents=4, num_layers=2, num_heads=4, head_dim=12, num_kv_heads=2, mlp_dim=64
    )
    ours = make_model(
        vision=VisionTransformer(image={"size": SIZE}, **OURS),
        connector=connector,
        text=make_text(model_type="mistral", sliding_window=None),
        max_images=3,
    )
    return Case(theirs=drawn(transformers.Idefics2ForConditionalGeneration(config)), ours=ours,
                names=partial(idefics_names, perceiver_names), fields=padded_fields, size=SIZE, norms_in_fp32=True,
                twins={"a norm less": without_last_norm, "values as keys": values_as_keys,
                       "positions": later_positions})  # fmt: skip


def shuffled(config: Any, model: Any) -> Case:
    described = config(
        vision_config={**TOWER, "image_size": LARGE},
        text_config=transformers.LlamaConfig(**TEXT, **VOCABULARY),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    ours = make_model(
        vision=VisionTransformer(image={"size": LARGE}, **OURS),
        connector=partial(PixelShuffleConnector, factor=2),
        max_images=3,
    )
    names = partial(idefics_names, lambda state: {"project.weight": state["modality_projection.proj.weight"]})
    return Case(theirs=drawn(model(described)), ours=ours, names=names, fields=padded_fields, size=LARGE,
                twins={"a norm less": without_last_norm, "by columns": by_columns,
                       "positions": later_positions})  # fmt: skip


def drawn(theirs: Any) -> Any:
    """Every weight anew, in evaluation mode."""
    draw_weights(theirs)
    return theirs.eval()


CASES: dict[str, Callable[[], Case]] = {
    "llava, layer -1": partial(llava, -1),
    "llava, layer -2": partial(llava, -2),
    "idefics2": idefics2,
    "idefics3": partial(shuffled, transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
    "smolvlm": partial(shuffled, transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
}
