"""The README.md of an exported model: what it is, how to use it, how far the other library is from our model."""

from __future__ import annotations

from typing import Any

from vlm_train.export.answers import Answering
from vlm_train.export.certificate import Certificate
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.nf4 import num_weights

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


ANSWERING = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [{tag}, vlm-train]
---
# {title}, trained with vlm-train

| | |
|---|---|
| image | {size} x {size} pixels, {resize}, {num_image_tokens} tokens each |
| dialogue | at most {context_length} tokens, {max_images} images |
| image tower | read {place} |
| language model | {language}, {vocab_size} tokens |
| parameters | {num_parameters:,} |

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER").eval()
processor = AutoProcessor.from_pretrained("THIS_FOLDER", backend="pil")  # the pixels of evaluation
turns = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is it?"}}]}}]
text = processor.apply_chat_template(turns, add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```

{certificate} The licence of the weights follows from the data they were trained on.
"""
TITLES = {"llava": "LLaVA", "idefics2": "Idefics2"}
SAME_LOGITS = """Certificate: on a few dialogues the logits of transformers differ from those of the trained model by at
most {logits:.1e}."""


def answering_card(trained: Answering, family: str, certificate: Certificate | None) -> str:
    """The card's text for a generative model exported to transformers."""
    model = trained.model
    language: Any = model.text.network
    said = NOT_CERTIFIED.format(library="transformers")
    layer = f"at layer {model.feature_layer}; what lies behind changes nothing and is never read"
    return ANSWERING.format(
        size=model.image_spec.size,
        resize=RESIZE[model.image_spec.resize],
        num_image_tokens=model.tokens_per_image,
        context_length=model.dialogue.context_length,
        max_images=model.dialogue.max_images,
        tag=family,
        title=TITLES[family],
        place="behind its last norm" if model.feature_layer is None else layer,
        language=language.config.model_type,
        vocab_size=model.text.vocab_size,
        num_parameters=num_weights(model),
        certificate=said if certificate is None else SAME_LOGITS.format(logits=certificate.logits),
    )
