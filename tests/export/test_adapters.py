"""A generative model with adapters is exported with them merged: folder and model say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from idefics2_toys import make_idefics
from llava_toys import TEXT, answering, draw_weights, make_model, words
from safetensors.torch import load_file

from vlm_train.errors import CheckpointError
from vlm_train.export import weights
from vlm_train.export.folders import export_model
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel

TOKENIZER = words()


def adapted(make: Any, **architecture: Any) -> GenerativeModel:
    model: GenerativeModel = make(TOKENIZER, architecture=architecture)
    keys = {"model_type": "llama", **TEXT, **architecture}
    model.text = CausalLanguageModel(spec=TOKENIZER.spec, architecture=keys, lora={"rank": 4, "alpha": 1.0})
    draw_weights(model)
    return model.eval()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("make", [make_model, make_idefics])
def test_the_folder_says_what_the_model_with_adapters_says(make: Any, is_tied: bool, tmp_path: Path) -> None:
    """Logits measured at most 7e-6."""
    model = adapted(make, tie_word_embeddings=is_tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export_model(answering(model, TOKENIZER), target="transformers", out=tmp_path / "out")
    assert report.certificate is not None
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names and not any("lora" in name or "base_layer" in name for name in names)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_merge_without_the_scale_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: alpha / rank forgotten."""
    merged = weights.merged
    monkeypatch.setattr(weights, "merged", lambda state: merged({**state, "text.lora_scale": torch.ones(())}))
    with pytest.raises(CheckpointError, match="not the same model"):
        export_model(answering(adapted(make_model), TOKENIZER), target="transformers", out=tmp_path / "out")
