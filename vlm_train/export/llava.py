"""transformers' LLaVA: generative models of ours as folders that it loads, and its folders as models of ours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, processors
from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlm_train.export.answers import Answering
from vlm_train.export.foreign import Foreign
from vlm_train.export.hf import TransformersModel, has_tokenizer, notes_on, processor_of
from vlm_train.export.llava_config import FAMILY, config_of, filled, node_of, read_part, spec_of, strategy_of
from vlm_train.export.weights import export_state
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.vision.pretrained import spec_of_processor
from vlm_train.types import IMAGE_ID

IMAGE_TOKEN = "<image>"


class LlavaInTransformers(TransformersModel):
    """A folder, or a name on the hub, in the hands of transformers."""

    auto = LlavaForConditionalGeneration

    def __init__(self, location: str | Path) -> None:
        super().__init__(location)
        self.image_id: int = self.model.config.image_token_index
        self.processor: Any = None
        if has_tokenizer(location):
            try:
                found = AutoProcessor.from_pretrained(location, backend="pil")
            except (ImportError, OSError, ValueError):  # no sentencepiece, or files that are no processor
                found = None
            self.processor = found if isinstance(found, LlavaProcessor) else None

    def logits(self, pixels_N3SS: Tensor, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """See `Speaking.logits`."""
        found: Tensor = self.model(
            input_ids=ids_BT.masked_fill(ids_BT == IMAGE_ID, self.image_id),
            attention_mask=(torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long(),
            pixel_values=pixels_N3SS if len(pixels_N3SS) else None,
        ).logits
        return found

    def prompt(self, text: str, picture: Image.Image) -> list[int] | None:
        """See `Speaking.prompt`."""
        written = self._written(text)
        if written is None:
            return None
        begin = self.processor.tokenizer.bos_token
        ids = self.processor(
            text=written,
            images=[picture] if IMAGE_TOKEN in text else None,
            add_special_tokens=begin is None or not written.startswith(begin),
        )["input_ids"][0]
        return [IMAGE_ID if number == self.image_id else number for number in ids]

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


def write(trained: Answering, directory: Path) -> str:
    """Writes config, weights, processor and the end of answers; returns the family. Raises ConfigError."""
    model = trained.model
    tokenizer = their_tokenizer(trained)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = config_of(model, image_id=image_id)
    state = export_state(model, family=FAMILY)
    with torch.device("meta"):
        theirs: Any = LlavaForConditionalGeneration(config)
    theirs.load_state_dict(
        filled(state, {name: tensor.shape for name, tensor in theirs.state_dict().items()}, config), assign=True
    )
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
    their_processor(model, tokenizer, trained.chat_template).save_pretrained(directory)
    return FAMILY


def their_processor(model: GenerativeModel, tokenizer: Any, chat_template: str | None = None) -> LlavaProcessor:
    """What makes pixels and ids of pictures and texts as the model wants them. `tokenizer`: has IMAGE_TOKEN."""
    vision: Any = model.vision
    size = model.image_spec.size
    return LlavaProcessor(
        image_processor=processor_of(model.image_spec),
        tokenizer=tokenizer,
        patch_size=size // round(vision.num_patches**0.5),
        vision_feature_select_strategy=strategy_of(model),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(vision.has_class_token),
        chat_template=chat_template,
    )


def their_tokenizer(trained: Answering) -> Any:
    """The tokenizer as LLaVA's processor wants it: with a token for images, special tokens where a text spells them,
    before a text what our dialogues begin with, behind it nothing, and padding in front."""
    assert trained.tokenizer is not None and trained.prompt is not None
    with tempfile.TemporaryDirectory() as place:
        trained.tokenizer.save(place)
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False, split_special_tokens=False)
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


def read(location: str, config: Any, processor: Any) -> Foreign:
    """The LLaVA at a local folder or of a name on the hub, read but not yet ours; see `hf.read`.

    Raises:
        ConfigError: it is or has something that our models are not.
    """
    node = node_of(config, spec_of_processor(processor))
    theirs = LlavaInTransformers(location)
    return Foreign(
        family=FAMILY,
        node=node,
        spec=spec_of(config),
        state=read_part(theirs.model.state_dict(), config),
        vocabulary=location if has_tokenizer(location) else None,
        notes=notes_on(processor),
        load=lambda: theirs,
    )
