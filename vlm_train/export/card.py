"""The README.md of an exported model: what it is, how to use it, how far transformers is from the trained model."""

from __future__ import annotations

from vlm_train.models.dual_encoder import DualEncoder

CERTIFIED_TEXTS = ["a red square above a blue circle", "Two dogs, one ball.", "", "a long caption " * 40]
"""What the certificate encodes: plain, with capitals and punctuation, empty, and longer than any context."""

CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [{family}, vlm-train]
---
# {title}, trained with vlm-train

| | |
|---|---|
| image | {size} x {size} pixels, {resize}, mean {mean}, std {std} |
| text | {vocab_size} tokens, context {context_length} |
| common space | {embed_dim} dimensions |
| parameters | {num_parameters:,} |

```python
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("THIS_FOLDER").eval()
image_processor = AutoImageProcessor.from_pretrained("THIS_FOLDER", backend="pil")  # the pixels of evaluation
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
texts = ["a photo of a cat", "a photo of a dog"]
inputs = image_processor(images=image, return_tensors="pt") | tokenizer(
    texts, padding="max_length", max_length={context_length}, truncation=True, return_tensors="pt"
)
logits = model(**inputs).logits_per_image
```

{padding}
Certificate: on a fixed batch the unit-length features of transformers differ from those of the trained model by at most
{difference:.1e}. The licence of the weights follows from the data they were trained on.
"""

PADDING = {
    "clip": "Padding does not change the result; the text is read at its end token.\n",
    "siglip": "Always pad to `max_length`: the text is read at the last position, padding included.\n",
}
LEFT_OUT = """Trained with the sigmoid objective, whose logit bias of {bias:.4f} CLIPModel has no place for: add it to
the logits before a sigmoid. Rankings and softmax are the same without it.
"""
RESIZE = {"shortest": "bicubic on the short side, then the centre", "squash": "bicubic to the square"}


def model_card(
    model: DualEncoder, family: str, feature_difference: float, *, left_out_bias: float | None = None
) -> str:
    """The card's text for an exported `model`."""
    image, text = model.image_spec, model.text_spec
    return CARD.format(
        family=family,
        title={"clip": "CLIP", "siglip": "SigLIP"}[family],
        size=image.size,
        resize=RESIZE[image.resize],
        mean=list(image.mean),
        std=list(image.std),
        vocab_size=text.vocab_size,
        context_length=text.context_length,
        embed_dim=model.embed_dim,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        padding=PADDING[family] + ("" if left_out_bias is None else LEFT_OUT.format(bias=left_out_bias)),
        difference=feature_difference,
    )
