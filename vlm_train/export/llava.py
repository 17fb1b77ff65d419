"""transformers' LLaVA: what makes its pixels and ids, and which model of ours is which of its."""

from __future__ import annotations

from typing import Any

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_train.export.hf import notes_on, processor_of
from vlm_train.export.llava_config import FAMILY, config_of, filled, node_of, read_part, strategy_of
from vlm_train.export.speaking import IMAGE_TOKEN, Kind, SpeakingModel
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.vision.pretrained import spec_of_processor


class LlavaInTransformers(SpeakingModel):
    """See `SpeakingModel`."""

    auto = LlavaForConditionalGeneration
    processors = (LlavaProcessor,)


def their_processor(model: GenerativeModel, tokenizer: Any, chat_template: str | None = None) -> LlavaProcessor:
    """See `Kind.processor_of`."""
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


KIND = Kind(
    family=FAMILY,
    library=LlavaInTransformers,
    config_of=config_of,
    processor_of=their_processor,
    node_of=lambda config, processor: node_of(config, spec_of_processor(processor)),
    notes_on=notes_on,
    filled=filled,
    read_part=read_part,
)
