"""transformers' Idefics2: what makes its pixels and ids, and which model of ours is which of its.

Its own processor puts a token of its own on both sides of an image, which dialogues of ours have only where a template
writes it. So a folder of ours has the processor of DeepSeek-VL, which puts nothing there but the tokens of the image,
however many: a chat template writes what else there is. The image processor is that of Idefics2, for squares of the
size of the tower, in which no image is split and none is padded.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    DeepseekVLProcessor,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
)

from vlm_train.export.hf import BICUBIC
from vlm_train.export.idefics2_config import FAMILY, config_of, filled, node_of, notes_on
from vlm_train.export.speaking import Kind, SpeakingModel
from vlm_train.models.generative import GenerativeModel


class Idefics2InTransformers(SpeakingModel):
    """See `SpeakingModel`."""

    auto = Idefics2ForConditionalGeneration
    processors = (DeepseekVLProcessor, Idefics2Processor)

    def __init__(self, location: Any) -> None:
        super().__init__(location)
        if self.processor is not None:
            self.processor.image_processor.do_image_splitting = False  # an image of ours is one image

    def pixel_values(self, pixels_N3SS: Tensor) -> Tensor:
        """All as images of one dialogue: the model lays them in order where their tokens are."""
        return pixels_N3SS[None]

    def prepare(self, picture: Image.Image) -> Tensor:
        """See `Library.prepare`."""
        processor = AutoImageProcessor.from_pretrained(self.location, backend="pil")
        pixels: Tensor = processor([[picture]], return_tensors="pt")["pixel_values"][0, 0]
        return pixels


def their_processor(model: GenerativeModel, tokenizer: Any, chat_template: str | None = None) -> DeepseekVLProcessor:
    """See `Kind.processor_of`."""
    spec = model.image_spec
    return DeepseekVLProcessor(
        image_processor=Idefics2ImageProcessorPil(
            size={"height": spec.size, "width": spec.size},
            image_mean=list(spec.mean),
            image_std=list(spec.std),
            resample=BICUBIC,
            do_image_splitting=False,
        ),
        tokenizer=tokenizer,
        num_image_tokens=model.tokens_per_image,
        chat_template=chat_template,
    )


KIND = Kind(
    family=FAMILY,
    library=Idefics2InTransformers,
    config_of=config_of,
    processor_of=their_processor,
    node_of=node_of,
    notes_on=notes_on,
    filled=filled,
    read_part=lambda state, config: dict(state),
)
