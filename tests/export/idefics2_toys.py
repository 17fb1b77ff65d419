"""Generative models with a perceiver, and transformers' Idefics2, of a few ten thousand weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import transformers
from llava_toys import SIGLIP, TEXT, TOWER, draw_weights, make_model, make_vision

from vlm_train.models.connectors.perceiver import PerceiverConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.types import Tokenizer

HEADS: Any = {"num_heads": 4, "head_dim": 12, "num_kv_heads": 2, "mlp_dim": 64}
SQUASHED: Any = {"size": 32, "resize": "squash", "mean": [0.5, 0.4, 0.5], "std": [0.5, 0.5, 0.4]}


def make_idefics(tokenizer: Tokenizer, *, vision: Any = None, connector: Any = None, **changes: Any) -> GenerativeModel:
    """SigLIP's tower read behind its last norm, a perceiver of 5 latents and 2 layers, a Llama."""
    heads = {**HEADS, "num_latents": 5, "num_layers": 2, **(connector or {})}
    tower = vision or make_vision(**{**SIGLIP, "image": SQUASHED})
    parts = {"feature_layer": None, "connector": partial(PerceiverConnector, **heads), **changes}
    return make_model(tokenizer, vision=tower, **parts)


def save_idefics(place: Path, *, vision: Any = None, perceiver: Any = None, text: Any = None, num_tokens: int = 200,
                 processor: Any = None) -> Any:  # fmt: skip
    """transformers' model with weights drawn by us, saved by itself; keys of the three configs."""
    sizes = {"hidden_size": TEXT["hidden_size"], "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4,
             "resampler_head_dim": 12, "num_key_value_heads": 2, **(perceiver or {})}  # fmt: skip
    ids = {"vocab_size": num_tokens, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.Idefics2Config(
        vision_config={**TOWER, **(vision or {})},
        perceiver_config=sizes,
        text_config=transformers.AutoConfig.for_model(
            **{**TEXT, **ids, **(text or {"model_type": "mistral", "sliding_window": None})}
        ),
        image_token_id=num_tokens - 1,
    )
    theirs = transformers.Idefics2ForConditionalGeneration(config).eval()
    draw_weights(theirs)
    theirs.save_pretrained(place)
    square = {"height": 32, "width": 32}
    transformers.Idefics2ImageProcessorPil(
        **{"size": square, "resample": 3, "do_image_splitting": False, **(processor or {})}
    ).save_pretrained(place)
    return theirs
