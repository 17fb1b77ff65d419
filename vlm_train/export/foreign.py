"""A model of another library, read but not yet ours, and files of tensors."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from vlm_train.assets import hub_access
from vlm_train.errors import ConfigError
from vlm_train.export.answers import Answering
from vlm_train.export.certificate import Trained
from vlm_train.export.rules import Family
from vlm_train.export.towers import Node, model_from
from vlm_train.export.weights import import_state
from vlm_train.models.generative import GenerativeModel
from vlm_train.types import Cleaning, TextSpec, Tokenizer

CLIP_VOCABULARY = "package:open-clip-torch"
"""The byte pairs of CLIP, which open_clip carries (see assets.py)."""

_COUNTS = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI kept among the tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """What reading a foreign folder or file gives.

    Attributes:
        family: by which rules its tensors become ours.
        node: the `model` of a config of ours, without `tokenizer`.
        spec: what its text tower reads.
        state: its tensors by its names, fp32.
        vocabulary: where its tokenizer lies: a folder, a hub name or CLIP_VOCABULARY; None where there is none.
        clean: what open_clip does to a text before a tokenizer of Hugging Face: `whitespace`, `lower`, `canonicalize`.
        notes: in what its preparation of images is not ours, a sentence each.
        load: makes the other library's own model of the same weights, for a certificate: `Library`, or `Speaking` for
            a generative model.
    """

    family: Family
    node: Node
    spec: TextSpec
    state: dict[str, Tensor]
    vocabulary: str | None
    notes: Sequence[str]
    load: Callable[[], Any]
    clean: Cleaning | None = None

    def trained(self, tokenizer: Tokenizer | None) -> Trained | Answering:
        """Our model with its weights. Raises ConfigError or CheckpointError where they do not fit its config."""
        model = model_from(self.node, self.spec if tokenizer is None else tokenizer.spec)
        extra = import_state(model, self.state, family=self.family)
        model.eval()
        if isinstance(model, GenerativeModel):
            return Answering(model=model, tokenizer=tokenizer)
        return Trained(model=model, tokenizer=tokenizer, **extra)


def read_config(location: str) -> tuple[Any, Any]:
    """The config and the image processor at a local folder or of a name on the hub. Raises ConfigError."""
    try:
        with hub_access(location):
            config = AutoConfig.from_pretrained(location, trust_remote_code=False)
            return config, AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(
            f"{location} holds no model that can be imported", got=str(error).strip().splitlines()[0],
            allowed="config.json of transformers, or open_clip_config.json", remedy="correct from=",
        ) from error  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle of tensors alone, fp32, under open_clip's flat names.

    Raises:
        ConfigError: no such file, or one that could run code when it is read.
    """
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read as weights alone",
            got=str(error).strip().splitlines()[0],
            allowed="safetensors, or a pickle of nothing but tensors (no TorchScript, no code)",
            remedy="save its state_dict() as safetensors where you trust it",
        ) from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} holds no state dict", got=type(found).__name__, allowed="names with tensors")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in _COUNTS}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
