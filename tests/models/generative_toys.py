"""A generative model of a few thousand weights, uneven dialogues, and transformers' LLaVA with our names."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vlm_train.models.connectors.linear import MLPConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import IMAGE_ID, NO_LABEL, Batch, TextSpec

SPEC = TextSpec(vocab_size=64, context_length=48, pad_id=0, bos_id=1, eos_id=2)
IMAGE_TOKEN = 63  # transformers' LLaVA has a real id where an image is read
SIZE, PATCH, NUM_TOKENS = 16, 8, 4
VISION = {"width": 32, "num_layers": 3, "num_heads": 2, "mlp_dim": 64, "activation": "quick_gelu"}
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
RENAMED = [
    (r"^model\.vision_tower\.embeddings\.class_embedding", "vision.class_token"),
    (r"^model\.vision_tower\.embeddings\.position_embedding\.weight", "vision.position"),
    (r"^model\.vision_tower\.embeddings\.patch_embedding", "vision.patch_embed"),
    (r"^model\.vision_tower\.encoder\.layers", "vision.blocks"),
    (r"^model\.vision_tower\.pre_layrnorm", "vision.pre_norm"),
    (r"^model\.vision_tower\.post_layernorm", "vision.post_norm"),
    (r"(vision.*)self_attn\.out_proj", r"\1attention.out"),
    (r"(vision.*)layer_norm([12])", r"\1norm\2"),
    (r"^model\.multi_modal_projector\.linear_1", "connector.layers.0"),
    (r"^model\.multi_modal_projector\.linear_2", "connector.layers.2"),
    (r"^model\.language_model", "text.network.model"),
    (r"^lm_head", "text.network.lm_head"),
]


def make_text(**changes: Any) -> CausalLanguageModel:
    """A tiny language model in evaluation mode; `changes` are keys of its architecture."""
    torch.manual_seed(0)
    text = CausalLanguageModel(spec=SPEC, architecture={"model_type": "llama", **TEXT, **changes})
    draw_weights(text)
    return text.eval()


def make_model(*, feature_layer: int | None = None, max_images: int = 2, **changes: Any) -> GenerativeModel:
    """In fp32; with `feature_layer` as LLaVA reads CLIP."""
    torch.manual_seed(0)
    tower = VisionTransformer(image={"size": SIZE}, patch_size=PATCH, **VISION)  # type: ignore[arg-type]
    parts = {"vision": tower, "connector": partial(MLPConnector, num_layers=2), "text": make_text()}
    parts["feature_layer"] = feature_layer
    model = GenerativeModel(**{**parts, "context_length": 48, "max_images": max_images, **changes})
    draw_weights(model)
    return model


def draw_weights(module: nn.Module) -> None:
    """Every weight anew and large, or little would depend on anything."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            std = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            drawn = torch.empty_like(parameter, dtype=torch.float32).normal_(std=std, generator=generator)
            parameter.copy_((parameter.ndim < 2) + drawn)


def make_batch(
    layout: tuple[tuple[int, int], ...] = ((1, 9), (0, 7), (2, 12), (0, 1), (1, 3)), size: int = SIZE
) -> Batch:
    """A dialogue for each (images, words): its first word, the images, the rest. What is told is its second half."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([words + NUM_TOKENS * images for images, words in layout])
    ids = torch.zeros(len(layout), int(lengths.max()), dtype=torch.int64)
    labels = torch.full_like(ids, NO_LABEL)
    for row, (images, words) in enumerate(layout):
        text = torch.randint(3, IMAGE_TOKEN, (words,), generator=generator)
        full = torch.cat([text[:1], torch.full((NUM_TOKENS * images,), IMAGE_ID), text[1:]])
        ids[row, : len(full)] = full
        told = slice(len(full) - max(1, words // 2), len(full))
        labels[row, told.start - 1 : told.stop - 1] = full[told]
    num_images = torch.tensor([images for images, _ in layout])
    shape = (len(layout), int(num_images.max().clamp(min=1)), 3, size, size)
    return Batch(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        num_images=num_images,
        dialogue_ids=ids,
        dialogue_labels=labels,
        dialogue_lengths=lengths,
    )


def rows_of(batch: Batch, *rows: int) -> Batch:
    """Some dialogues of a batch, padded to the longest of them."""
    index = torch.tensor(rows)
    longest = int(batch["dialogue_lengths"][index].max())
    taken: Any = {name: value[index] for name, value in batch.items()}  # type: ignore[index]
    return Batch(**{name: value[:, :longest] if name in ("dialogue_ids", "dialogue_labels") else value
                    for name, value in taken.items()})  # fmt: skip


def real(batch: Batch) -> Tensor:
    """Where a token is: bool [B, T]."""
    return torch.arange(batch["dialogue_ids"].shape[1]) < batch["dialogue_lengths"][:, None]


def logits(model: GenerativeModel, batch: Batch) -> Tensor:
    """[B, T, V]."""
    outputs = model(batch)
    return outputs["token_hidden"] @ outputs["token_vocabulary"].T


def loss(model: GenerativeModel, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of what is to be told."""
    labels = batch["dialogue_labels"]
    return nn.functional.cross_entropy(logits(model, batch).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def largest(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert mine.keys() == other.keys()
    return max((mine[name] - other[name]).abs().max().item() for name in mine)


def as_theirs(model: GenerativeModel, batch: Batch) -> dict[str, Tensor]:
    """The fields of transformers' LLaVA: pixels of the images that are there, labels under the tokens themselves."""
    there = torch.arange(batch["images"].shape[1]) < batch["num_images"][:, None]
    return {
        "input_ids": batch["dialogue_ids"].masked_fill(batch["dialogue_ids"] == IMAGE_ID, IMAGE_TOKEN),
        "attention_mask": real(batch).long(),
        "pixel_values": model.normalize(batch["images"][there]),
        "labels": nn.functional.pad(batch["dialogue_labels"], (1, 0), value=NO_LABEL)[:, :-1],
    }


def hugging_face_llava(feature_layer: int) -> transformers.LlavaForConditionalGeneration:
    """transformers' model of the same sizes, every weight drawn anew, in evaluation mode."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=SIZE, patch_size=PATCH),
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=64, bos_token_id=1, eos_token_id=2),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=feature_layer,
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    draw_weights(theirs)
    return theirs


def renamed(tensors: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """Weights or gradients of transformers' LLaVA by our names; those of layers that we do not have are left out."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, name_of_ours in RENAMED:
            name = re.sub(pattern, name_of_ours, name)
        found[name] = tensor
    for name in [name for name in found if name.startswith("vision") and "q_proj" in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("self_attn.q_proj", "attention.qkv")] = torch.cat(parts)
    names = dict(ours.named_parameters())
    return {name: tensor for name, tensor in found.items() if name in names}
