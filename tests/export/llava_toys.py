"""Generative models of a few ten thousand weights with a tokenizer, and transformers' LLaVA of such sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from vlm_train.data.chat import Turn
from vlm_train.data.chat_jinja import jinja_of
from vlm_train.data.decode import SampleError
from vlm_train.data.dialogue import DialogueEncoder
from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.errors import CheckpointError
from vlm_train.export.answers import Answering
from vlm_train.models.connectors.linear import MLPConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.vision.pretrained import HuggingFaceVision
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import Tokenizer

TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
TOWER: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
SIGLIP: Any = {"pool": "mean", "pre_norm": False, "activation": "gelu_tanh", "norm_eps": 1e-6}


def words(**options: Any) -> BytePairTokenizer:
    """Our tokenizer with the tokens of ChatML."""
    special = ["<|im_start|>", "<|im_end|>"]
    texts = ["a red square above the blue circle", "Is there a dog? yes no"]
    return BytePairTokenizer.train(texts, **{"vocab_size": 300, "context_length": 64, "special_tokens": special,
                                             **options})  # fmt: skip


def draw_weights(module: nn.Module) -> None:
    """Every weight anew and large, or little would depend on anything."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            std = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            drawn = torch.empty_like(parameter).normal_(std=std, generator=generator)
            parameter.copy_((parameter.ndim < 2) + drawn)


def make_vision(**changes: Any) -> VisionTransformer:
    sizes: Any = {"patch_size": 8, "width": 32, "num_layers": 3, "num_heads": 2, "activation": "quick_gelu"}
    return VisionTransformer(**{"image": {"size": 32}, **sizes, **changes})


def make_model(tokenizer: Tokenizer, *, vision: Any = None, connector: Any = None, architecture: Any = None,
               **changes: Any) -> GenerativeModel:  # fmt: skip
    """CLIP's tower read at layer -2, LLaVA's connector, a Llama."""
    text = CausalLanguageModel(
        spec=tokenizer.spec, architecture={"model_type": "llama", **TEXT, **(architecture or {})}
    )
    parts: Any = {"feature_layer": -2, "context_length": 320, **changes}
    model = GenerativeModel(
        vision=vision or make_vision(), connector=connector or partial(MLPConnector), text=text, **parts
    )
    draw_weights(model)
    return model.eval()


def answering(model: GenerativeModel, tokenizer: Tokenizer, template: str = "chatml", system: str | None = None
              ) -> Answering:  # fmt: skip
    """What the command makes of a run."""
    encoder = DialogueEncoder(template, tokenizer, model.dialogue, system)

    def prompt(text: str) -> list[int] | None:
        try:
            return [int(number) for number in encoder.prompt([Turn("user", text)])]
        except SampleError:
            return None

    return Answering(model=model, tokenizer=tokenizer, prompt=prompt, stop_id=encoder.stop_id,
                     chat_template=jinja_of(encoder, tokenizer))  # fmt: skip


def save_tower(kind: str, place: Path) -> HuggingFaceVision:
    """A tower as transformers saves it, read back."""
    if kind == "clip":
        network: Any = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(place)
    else:
        network = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER))
        transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
    network.save_pretrained(place)
    return HuggingFaceVision(path=str(place))


def save_llava(place: Path, *, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None,
               num_tokens: int = 200, **changes: Any) -> transformers.LlavaForConditionalGeneration:  # fmt: skip
    """transformers' model with weights drawn by us, saved by itself; `vision` and `text`: keys of the two configs."""
    vision = {"model_type": "clip_vision_model", **TOWER, **(vision or {})}
    ids = {"vocab_size": num_tokens, "bos_token_id": 1, "eos_token_id": 2}
    text = {"model_type": "llama", **TEXT, **ids, **(text or {})}
    config = transformers.LlavaConfig(
        vision_config=transformers.AutoConfig.for_model(**vision),
        text_config=transformers.AutoConfig.for_model(**text),
        **{"image_token_index": num_tokens - 1, "image_seq_length": 16, **changes},
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    draw_weights(theirs)
    theirs.save_pretrained(place)
    if vision["model_type"] == "clip_vision_model":
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(place)
    else:
        transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
    return theirs


def refusal_of(
    folder: Path, name: str, change: Callable[[dict[str, Any]], Any], compared: Callable[[], object]
) -> list[str]:
    """The words of the refusal when `compared` reads a folder of which file `name` was changed."""
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="not the same model") as caught:
        compared()
    return str(caught.value.got).split()


def check_twin_is_refused(
    folder: Path, twin: tuple[str, Callable[[dict[str, Any]], Any]], compared: Callable[[], object], least: float
) -> None:
    """A change of config.json moves logits by `least` or more; one of the processor, tokens or pixels."""
    name, change = twin
    said = refusal_of(folder, name, change, compared)
    if name == "config.json":
        assert float(said[2].rstrip(",")) > least
    else:
        assert "tokens False" in " ".join(said) or float(said[-1]) > 4


def drawing(number: int) -> Image.Image:
    """A picture of its own size."""
    height, width = 30 + 7 * number, 61 - 9 * number
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))
