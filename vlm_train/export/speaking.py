"""Generative models of ours as folders that transformers loads, and its folders as models of ours: what is the same
whichever of its classes holds them. `KIND` of `llava` and of `idefics2` says what is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, processors
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from vlm_train.export.answers import Answering
from vlm_train.export.foreign import Foreign
from vlm_train.export.hf import TransformersModel, has_tokenizer
from vlm_train.export.rules import Family
from vlm_train.export.towers import Node
from vlm_train.export.weights import export_state
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import num_positions
from vlm_train.types import IMAGE_ID, TextSpec

IMAGE_TOKEN = "<image>"

Shapes = Mapping[str, torch.Size]
Tensors = Mapping[str, Tensor]


class SpeakingModel(TransformersModel):
    """A folder, or a name on the hub, in the hands of transformers; see `answers.Speaking`.

    A subclass has `auto`, its class there, and `processors`, the classes that write its questions as we know them.
    """

    processors: tuple[type, ...] = ()

    def __init__(self, location: str | Path) -> None:
        super().__init__(location)
        self.image_id: int = self.model.config.image_token_id
        self.processor: Any = None
        if has_tokenizer(location):
            try:
                found = AutoProcessor.from_pretrained(location, backend="pil")
            except (ImportError, OSError, ValueError):  # no sentencepiece, or files that are no processor
                found = None
            self.processor = found if isinstance(found, self.processors) else None

    def pixel_values(self, pixels_N3SS: Tensor) -> Tensor:
        """The pixels of N images, 1 or more, as the model takes them."""
        return pixels_N3SS

    def logits(self, pixels_N3SS: Tensor, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """See `Speaking.logits`."""
        found: Tensor = self.model(
            input_ids=ids_BT.masked_fill(ids_BT == IMAGE_ID, self.image_id),
            attention_mask=(torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long(),
            pixel_values=self.pixel_values(pixels_N3SS) if len(pixels_N3SS) else None,
        ).logits
        return found

    def prompt(self, text: str, picture: Image.Image) -> list[int] | None:
        """See `Speaking.prompt`."""
        written = self._written(text)
        if written is None:
            return None
        begin = self.processor.tokenizer.bos_token
        ids = self.processor(
            text=[written],
            images=[picture] if IMAGE_TOKEN in text else None,
            add_special_tokens=begin is None or not written.startswith(begin),
            return_tensors="pt",
        )["input_ids"][0]
        return [IMAGE_ID if number == self.image_id else number for number in ids.tolist()]

    def _written(self, text: str) -> str | None:
        """A question by the chat template, which takes parts or texts; None where it does not write it whole."""
        if self.processor is None or not self.processor.chat_template:
            return None
        words = text.removeprefix(f"{IMAGE_TOKEN}\n")
        parts = [*[{"type": "image"}] * text.count(IMAGE_TOKEN), {"type": "text", "text": words}]
        for content in (parts, text):
            turns = [{"role": "user", "content": content}]
            try:
                found = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except Exception:  # a template refuses what it likes, each in its own way
                continue
            if found.count(IMAGE_TOKEN) == text.count(IMAGE_TOKEN):
                return str(found)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A class of transformers that holds generative models of ours.

    Attributes:
        family: by which rules their tensors become ours.
        library: what runs a folder.
        config_of: the config of a model with the token `image_id` for images. Raises ConfigError for a model that this
            class does not hold.
        processor_of: what makes pixels and ids, of a model, a tokenizer that has IMAGE_TOKEN, and a chat template.
        node_of: the model node of a config and an image processor. Raises ConfigError for what our models are not.
        notes_on: in what an image processor is not ours, a sentence each.
        filled: tensors of ours with what this class has beside them; of `state`, `shapes` of its own and its config.
        read_part: what of its tensors is read; of `state` and its config. Raises ConfigError.
    """

    family: Family
    library: type[SpeakingModel]
    config_of: Callable[[GenerativeModel, int], Any]
    processor_of: Callable[[GenerativeModel, Any, str | None], Any]
    node_of: Callable[[Any, Any], Node]
    notes_on: Callable[[Any], Sequence[str]]
    filled: Callable[[Tensors, Shapes, Any], dict[str, Tensor]]
    read_part: Callable[[Tensors, Any], dict[str, Tensor]]


def write(kind: Kind, trained: Answering, directory: Path) -> None:
    """Writes config, weights, processor and the end of answers. Raises ConfigError."""
    model = trained.model
    tokenizer = their_tokenizer(trained)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = kind.config_of(model, image_id)
    state = export_state(model, family=kind.family)
    with torch.device("meta"):
        theirs: Any = kind.library.auto(config)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(kind.filled(state, shapes, config), assign=True)
    theirs.tie_weights()
    # a token that means an image is never an answer; without it none of its rows is asked
    theirs.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=trained.stop_id,
        pad_token_id=trained.stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_tokens=[image_id],
    )
    directory.mkdir(parents=True, exist_ok=True)
    theirs.save_pretrained(directory)
    kind.processor_of(model, tokenizer, trained.chat_template).save_pretrained(directory)


def their_tokenizer(trained: Answering) -> Any:
    """The tokenizer as processors want it: with a token for images, special tokens where a text spells them, before a
    text what our dialogues begin with, behind it nothing, and padding in front."""
    assert trained.tokenizer is not None and trained.prompt is not None
    with tempfile.TemporaryDirectory() as place:
        trained.tokenizer.save(place)
        tokenizer: Any = AutoTokenizer.from_pretrained(
            place,
            trust_remote_code=False,
            split_special_tokens=False,
            extra_special_tokens={"image_token": IMAGE_TOKEN},
        )
    tokenizer.backend_tokenizer.no_truncation()  # ours holds that of a caption's context, and `max_length` with it
    for key in ("max_length", "stride", "truncation_strategy"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    tokenizer.padding_side, tokenizer.model_max_length = "left", trained.model.dialogue.context_length
    spec, plain = trained.tokenizer.spec, tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = spec.bos_id is not None and (trained.prompt("?") or [-1])[0] == spec.bos_id
    if tokenizer("a")["input_ids"] != [*([spec.bos_id] if begins else []), *plain]:
        begin = f"{tokenizer.bos_token} " if begins else ""
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin}$A",
            pair=f"{begin}$A {begin}$B:1",
            special_tokens=[(tokenizer.bos_token, spec.bos_id)] if begins else [],
        )
    return tokenizer


def read(kind: Kind, location: str, config: Any, processor: Any) -> Foreign:
    """The model at a local folder or of a name on the hub, read but not yet ours; see `hf.read`.

    Raises:
        ConfigError: it is or has something that our models are not.
    """
    node = kind.node_of(config, processor)
    theirs = kind.library(location)
    return Foreign(
        family=kind.family,
        node=node,
        spec=spec_of(config),
        state=kind.read_part(theirs.model.state_dict(), config),
        vocabulary=location if has_tokenizer(location) else None,
        notes=kind.notes_on(processor),
        load=lambda: theirs,
    )


def spec_of(config: Any) -> TextSpec:
    """What the language model of such a config reads."""
    text = config.text_config
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    eos_id = text.vocab_size - 1 if ends[0] is None else int(ends[0])
    return TextSpec(
        vocab_size=text.vocab_size,
        context_length=num_positions(text),
        pad_id=eos_id if text.pad_token_id is None else text.pad_token_id,
        bos_id=text.bos_token_id,
        eos_id=eos_id,
    )
