"""The recipes of models that answer: sizes of those with published towers, counted without memory from their configs
alone, and what their small forms change of `llava_tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from vlm_train import build
from vlm_train.cli.compose import compose_config
from vlm_train.cli.stages import compose_stages
from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.schema import flatten

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
          "image_size": 384, "patch_size": 14}  # fmt: skip
B16 = {"image_size": 224, "patch_size": 16}
LLAMA3 = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
          "max_position_embeddings": 8192}  # fmt: skip
MISTRAL = {**LLAMA3, "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768,
           "sliding_window": 4096}  # fmt: skip
SMOL = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True}  # fmt: skip
STEPS = ("trainer.max_steps", "schedule.total_steps")
TINY = {"llama3v_seed_tiny": 36, "idefics2_tiny": 16, "nano_vlm_tiny": 9}  # tokens of an image


def folders(place: Path, vision: dict[str, Any], text: dict[str, Any]) -> list[str]:
    """Configs, processor and a tokenizer where the hub has weights beside them."""
    config = transformers.SiglipConfig(vision_config=vision)
    config.save_pretrained(place / "vision")
    square = {"height": vision["image_size"], "width": vision["image_size"]}
    transformers.SiglipImageProcessor(size=square).save_pretrained(place / "vision")
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    BytePairTokenizer.train(["a red square"], vocab_size=300, context_length=64, special_tokens=special).save(
        str(place / "text")
    )
    transformers.AutoConfig.for_model(**text).save_pretrained(place / "text")
    return [f"model.vision.path={place / 'vision'}", f"model.text.path={place / 'text'}"]


@pytest.mark.parametrize(
    ("name", "vision", "text", "num_tokens", "connector", "millions"),
    [
        ("llama3v_seed_8b", SO400M, LLAMA3, 729, 407.48, 8850.73),
        ("idefics2_8b", SO400M, MISTRAL, 64, 743.22, 8397.94),
        ("nano_vlm", B16, SMOL, 49, 1.77, 222.08),
    ],
)
def test_a_recipe_has_the_published_sizes(
    name: str, vision: Any, text: Any, num_tokens: int, connector: float, millions: float, tmp_path: Path
) -> None:
    words = [f"experiment={name}", *folders(tmp_path, vision, text)]
    config = compose_config(words)
    for stage in (compose_stages(config, words) or {name: config}).values():
        parts: Any = build.skeleton(stage)
        assert all(parameter.is_meta for parameter in parts.model.parameters())
        assert parts.model.tokens_per_image == num_tokens
        assert count(parts.model.connector) == pytest.approx(connector, abs=0.005)
        assert count(parts.model) == pytest.approx(millions, abs=0.005)


def count(module: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("name", list(TINY))
def test_a_small_form_is_llava_tiny_but_for_its_connector_what_is_frozen_and_for_how_long(name: str) -> None:
    stages, llavas = (compose_stages(compose_config(words), words)
                      for words in ([f"experiment={name}"], ["experiment=llava_tiny"]))  # fmt: skip
    assert stages.keys() == llavas.keys()
    for stage, llava in zip(stages.values(), llavas.values(), strict=True):
        mine, other = (flatten(OmegaConf.to_container(config)) for config in (stage, llava))
        changed = {key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)}
        told = {key for key in changed if not key.startswith(("model.connector.", "optim.groups", "run.", *STEPS))}
        assert any(key.startswith("model.connector") for key in changed) and not told
        model: Any = build.skeleton(stage).model
        assert model.tokens_per_image == TINY[name]
