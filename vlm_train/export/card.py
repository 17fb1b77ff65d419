"""The README.md of an exported model: what it is, how to use it, how far the other library is from our model."""

from __future__ import annotations

from vlm_train.export.certificate import Certificate
from vlm_train.models.dual_encoder import DualEncoder

CARD = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags: [{tag}, vlm-train]
---
# {title}, trained with vlm-train

| | |
|---|---|
| image | {size} x {size} pixels, {resize}, mean {mean}, std {std} |
| text | {vocab_size} tokens, context {context_length} |
| common space | {embed_dim} dimensions |
| parameters | {num_parameters:,} |

```python
{usage}
```

{notes}
{certificate} The licence of the weights follows from the data they were trained on.
"""

IN_TRANSFORMERS = """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("THIS_FOLDER").eval()
image_processor = AutoImageProcessor.from_pretrained("THIS_FOLDER", backend="pil")  # the pixels of evaluation
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
texts = ["a photo of a cat", "a photo of a dog"]
inputs = image_processor(images=image, return_tensors="pt") | tokenizer(
    texts, padding="max_length", max_length={context_length}, truncation=True, return_tensors="pt"
)
logits = model(**inputs).logits_per_image"""
IN_OPEN_CLIP = """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:THIS_FOLDER")
texts = tokenizer(["a photo of a cat", "a photo of a dog"])
logits, _ = model.eval().get_logits(preprocess(image).unsqueeze(0), texts)"""
USAGE = {"transformers": IN_TRANSFORMERS, "open_clip": IN_OPEN_CLIP}

PADDED = "Always pad to the full length: the text is read at the last position, padding included.\n"
ANY_PADDING = "Padding does not change the result; the text is read at its end token.\n"
LEFT_OUT = """Trained with the sigmoid objective, whose logit bias of {bias:.4f} CLIPModel has no place for: add it to
the logits before a sigmoid. Rankings and softmax are the same without it.
"""
RESIZE = {"shortest": "bicubic on the short side, then the centre", "squash": "bicubic to the square"}
CERTIFIED = """Certificate: on a fixed batch the unit-length features of {library} differ from those of the
trained model by at most {features:.1e}."""
NOT_CERTIFIED = "Written without a certificate: nobody has compared {library} with the trained model."


def model_card(
    model: DualEncoder,
    library: str,
    family: str,
    certificate: Certificate | None,
    *,
    left_out_bias: float | None = None,
) -> str:
    """The card's text for a `model` exported to `library`."""
    image, text = model.image_spec, model.text_spec
    is_siglip = family in ("siglip", "open_clip_timm")
    notes = PADDED if text.pad_to_max else ANY_PADDING
    said = NOT_CERTIFIED if certificate is None else CERTIFIED
    return CARD.format(
        library=library,
        tag="siglip" if is_siglip else "clip",
        title="SigLIP" if is_siglip else "CLIP",
        size=image.size,
        resize=RESIZE[image.resize],
        mean=list(image.mean),
        std=list(image.std),
        vocab_size=text.vocab_size,
        context_length=text.context_length,
        embed_dim=model.embed_dim,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        usage=USAGE[library].format(context_length=text.context_length),
        notes=notes + ("" if left_out_bias is None else LEFT_OUT.format(bias=left_out_bias)),
        certificate=said.format(library=library, features=0.0 if certificate is None else certificate.features),
    )
