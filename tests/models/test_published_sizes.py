"""The towers of the recipes have as many parameters as the published models, counted without memory."""

from __future__ import annotations

import pytest
import torch
from open_clip import get_model_config
from open_clip.model import CLIP
from transformers import SiglipConfig, SiglipModel

from vlm_train import build
from vlm_train.cli.compose import compose_config


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def ours(*words: str) -> int:
    parts = build.skeleton(compose_config(words))
    assert all(parameter.is_meta for parameter in parts.model.parameters())
    return count(parts.model) + count(parts.objective)


@pytest.mark.parametrize(
    ("choice", "name", "millions"),
    [
        ("clip_b32", "ViT-B-32", 151.28),
        ("clip_b16", "ViT-B-16", 149.62),
        ("clip_l14", "ViT-L-14", 427.62),
        ("clip_rn50", "RN50", 102.01),
    ],
)
def test_clip(choice: str, name: str, millions: float) -> None:
    settings = get_model_config(name)
    with torch.device("meta"):
        theirs = CLIP(**settings)
    assert ours(f"model={choice}") == count(theirs)
    assert count(theirs) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("choice", "width", "num_layers", "num_heads", "mlp_dim", "patch", "context", "millions"),
    [
        ("siglip_b16", 768, 12, 12, 3072, 16, 64, 203.16),
        ("siglip_so400m", 1152, 27, 16, 4304, 14, 16, 877.36),  # published with 16 tokens, the recipe has 64
    ],
)
def test_siglip(
    choice: str, width: int, num_layers: int, num_heads: int, mlp_dim: int, patch: int, context: int, millions: float
) -> None:
    both = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "intermediate_size": mlp_dim,
    }
    text = {**both, "vocab_size": 32_000, "max_position_embeddings": context, "projection_size": width}
    config = SiglipConfig(vision_config={**both, "image_size": 224, "patch_size": patch}, text_config=text)
    with torch.device("meta"):
        theirs = SiglipModel(config)
    mine = ours(f"model={choice}", "objective=sigmoid", f"model.tokenizer.context_length={context}")
    assert mine == count(theirs)
    assert mine / 1e6 == pytest.approx(millions, abs=0.005)
