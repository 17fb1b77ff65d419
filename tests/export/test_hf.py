"""An exported folder, loaded by transformers alone, is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.errors import CheckpointError
from vlm_train.export import hf
from vlm_train.export.hf import TOLERANCE, export_transformers, import_transformers
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.vision.image import Normalize
from vlm_train.types import ImageSpec, Tokenizer

SCALE, BIAS = torch.tensor([3.0]), torch.tensor([-4.0])
TEXTS = ["a red square", "dogs"]


def drawing(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_export_loads_with_the_same_logits(request: pytest.FixtureRequest, name: str, out: Path) -> None:
    model: DualEncoder = request.getfixturevalue(name)
    tokenizer: Tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    bias = BIAS if name == "siglip" else None
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = export_transformers(model, tokenizer=tokenizer, logit_scale=SCALE, logit_bias=bias, out=out)
    assert report.family == name
    assert report.feature_difference < 2e-6  # measured 2.4e-7
    assert report.logit_difference < 2e-5  # exp(3) times that; measured 2.9e-6
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids, mask = tokenizer(TEXTS)
    logits = SCALE.exp() * model.encode_image(images) @ model.encode_text(ids, mask).T + (0 if bias is None else bias)
    inputs = AutoTokenizer.from_pretrained(out)(
        TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    theirs = AutoModel.from_pretrained(out)(pixel_values=model.normalize(images), **inputs).logits_per_image
    assert torch.allclose(theirs, logits, atol=2e-5)
    assert "attention_mask" in inputs or name == "siglip"


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_import_gives_the_model_back_bitwise(request: pytest.FixtureRequest, name: str, out: Path) -> None:
    model: DualEncoder = request.getfixturevalue(name)
    bias = BIAS if name == "siglip" else None
    tokenizer: Tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    export_transformers(model, tokenizer=tokenizer, logit_scale=SCALE, logit_bias=bias, out=out)
    again, extra = import_transformers(str(out))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert again.image_spec == model.image_spec and again.text_spec == model.text_spec
    assert torch.equal(extra["logit_scale"], SCALE)
    assert bias is None or torch.equal(extra["logit_bias"], bias)


def by_hand(image: Image.Image, spec: ImageSpec) -> Tensor:
    """Pillow's bicubic, then the centre: what evaluation feeds to the model."""
    size = spec.size
    if spec.resize == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        short = min(image.size)
        image = image.resize((int(size * image.width / short), int(size * image.height / short)), 3)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return Normalize(spec)(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None])


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("shape", [(50, 70), (97, 40), (32, 32)])
def test_the_exported_image_processor_makes_our_pixels(
    request: pytest.FixtureRequest, name: str, shape: tuple[int, int], out: Path
) -> None:
    spec = request.getfixturevalue(name).image_spec
    hf.processor_of(spec).save_pretrained(out)
    image = drawing(*shape)
    ours = by_hand(image, spec)
    pillow = AutoImageProcessor.from_pretrained(out, backend="pil")(image, return_tensors="pt")["pixel_values"]
    torchvision = AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt")["pixel_values"]
    level = 1 / 255 / min(spec.std)
    assert (pillow - ours).abs().max() < 1e-5  # the same resampling; measured 5e-7, rounding of the normalisation
    # torchvision resamples in other fixed-point steps: on noise, the worst case, up to 4 of 255 levels, 0.4 on average
    assert (torchvision - ours).abs().max() < 5 * level
    assert (torchvision - ours).abs().mean() < 0.6 * level


def test_the_processor_of_the_folder_takes_images_and_texts(
    clip: DualEncoder, clip_tokenizer: BytePairTokenizer, out: Path
) -> None:
    export_transformers(clip, tokenizer=clip_tokenizer, logit_scale=SCALE, out=out)
    inputs = AutoProcessor.from_pretrained(out)(
        text=TEXTS, images=drawing(40, 50), padding="max_length", return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert torch.equal(inputs["input_ids"], clip_tokenizer(TEXTS)[0])
    card = (out / "README.md").read_text()
    assert "32 x 32 pixels" in card and "Certificate" in card
    assert json.loads((out / "config.json").read_text())["architectures"] == ["CLIPModel"]


def test_a_bias_that_clip_cannot_hold_is_left_out_and_told(
    clip: DualEncoder, clip_tokenizer: BytePairTokenizer, out: Path
) -> None:
    report = export_transformers(clip, tokenizer=clip_tokenizer, logit_scale=SCALE, logit_bias=BIAS, out=out)
    assert report.left_out_bias == float(BIAS) and report.logit_difference < 1e-4
    assert f"{float(BIAS):.4f}" in (out / "README.md").read_text()


def test_an_export_that_is_another_model_is_refused(
    clip: DualEncoder, clip_tokenizer: BytePairTokenizer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf.TO_TRANSFORMERS, "quick_gelu", "gelu")  # the classic mistake
    with pytest.raises(CheckpointError, match="not the model that was trained") as caught:
        export_transformers(clip, tokenizer=clip_tokenizer, logit_scale=SCALE, out=out)
    difference = float(str(caught.value.got).split()[2].rstrip(","))
    assert difference > 100 * TOLERANCE  # measured 3e-3
