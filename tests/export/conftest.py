"""Small CLIP and SigLIP models of ours, their tokenizers, one batch for all, and a small SigLIP tower for timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor

from vlm_train.data.rendering import render
from vlm_train.data.tokenizer import BytePairTokenizer, HuggingFaceTokenizer
from vlm_train.data.transforms import EvalTransform
from vlm_train.export.certificate import Prepare
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import ImageSpec, TextSpec, Tokenizer

CONTEXT = 12


@register_model
def vit_small_for_tests_patch8_siglip_32(
    pretrained: bool = False, num_classes: int = 0, global_pool: str = "map", **rest: Any
) -> TimmTransformer:
    """open_clip takes SigLIP's image towers from timm by name, and the smallest there has 86 M parameters."""
    return TimmTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=3,
        num_heads=2,
        mlp_ratio=100 / 64,
        class_token=False,
        num_classes=num_classes,
        global_pool=global_pool,
    )


@pytest.fixture(scope="session")
def clip_tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.train(["a red square", "two dogs, one ball"], vocab_size=270, context_length=CONTEXT)


@pytest.fixture(scope="session")
def siglip_tokenizer(clip_tokenizer: BytePairTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = str(tmp_path_factory.mktemp("tokenizer"))
    clip_tokenizer.save(directory)
    return HuggingFaceTokenizer(path=directory, context_length=CONTEXT, pad_to_max=True)


def make_clip(spec: TextSpec, *, activation: str = "quick_gelu", size: int = 32) -> DualEncoder:
    torch.manual_seed(0)
    vision = VisionTransformer(
        image={"size": size}, patch_size=8, width=64, num_layers=3, num_heads=2, activation=activation
    )
    text = TextTransformer(spec=spec, width=48, num_layers=2, num_heads=3, mlp_dim=100, activation=activation)
    return perturbed(DualEncoder(vision=vision, text=text, embed_dim=24))


def make_siglip(spec: TextSpec, *, activation: str = "gelu_tanh") -> DualEncoder:
    torch.manual_seed(1)
    half = (0.5, 0.5, 0.5)
    vision = VisionTransformer(
        image=ImageSpec(size=32, mean=half, std=half, resize="squash"),
        patch_size=8,
        width=64,
        num_layers=3,
        num_heads=2,
        mlp_dim=100,
        activation=activation,
        norm_eps=1e-6,
        pool="map",
        pre_norm=False,
    )
    text = TextTransformer(
        spec=spec,
        width=48,
        num_layers=2,
        num_heads=3,
        activation="gelu_tanh",
        norm_eps=1e-6,
        pool="last",
        causal=False,
    )
    return perturbed(DualEncoder(vision=vision, text=text, embed_dim=64, image_projection="none", text_bias=True))


def perturbed(model: DualEncoder) -> DualEncoder:
    """Moves every parameter off its start: zero biases and unit norms would hide a tensor that went astray."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def clip(clip_tokenizer: BytePairTokenizer) -> DualEncoder:
    return make_clip(clip_tokenizer.spec)


@pytest.fixture
def siglip(siglip_tokenizer: Tokenizer) -> DualEncoder:
    return make_siglip(siglip_tokenizer.spec)


@pytest.fixture
def siglip_of_timm(siglip_tokenizer: Tokenizer) -> DualEncoder:
    return make_siglip(siglip_tokenizer.spec, activation="gelu")


@pytest.fixture
def prepare() -> Callable[[ImageSpec], Prepare]:
    """What evaluation makes of a picture, by what the tower wants."""

    def of(spec: ImageSpec) -> Prepare:
        transform, unused = EvalTransform(spec=spec), np.random.default_rng(0)
        return lambda picture: render(
            np.array(picture), transform.plan(picture.width, picture.height, unused)
        ).transpose(2, 0, 1)

    return of


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "exported"
