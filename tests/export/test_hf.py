"""An exported folder, loaded by transformers alone, is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BlipConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedConfig,
    Siglip2Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.export import hf
from vlm_train.export.certificate import TOLERANCE, Trained, certify
from vlm_train.export.folders import ExportReport, export_model, read_model
from vlm_train.export.weights import export_state
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.vision.image import Normalize
from vlm_train.types import ImageSpec, Tokenizer

SCALE, BIAS = torch.tensor([3.0]), torch.tensor([-4.0])
TEXTS = ["a red square", "dogs"]


def export(
    model: DualEncoder, tokenizer: Tokenizer, out: Path, *, bias: Tensor | None = None, verify: bool = True
) -> ExportReport:
    trained = Trained(model=model, tokenizer=tokenizer, logit_scale=SCALE, logit_bias=bias)
    return export_model(trained, target="transformers", out=out, verify=verify)


def drawing(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_export_loads_with_the_same_logits(request: pytest.FixtureRequest, name: str, out: Path) -> None:
    model: DualEncoder = request.getfixturevalue(name)
    tokenizer: Tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    bias = BIAS if name == "siglip" else None
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = export(model, tokenizer, out, bias=bias)
    assert report.family == name and report.certificate is not None and report.certificate.has_tokens
    assert report.certificate.features < 2e-6  # measured 2.4e-7
    assert report.certificate.logits < 2e-5  # exp(3) times that; measured 2.9e-6
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
    export(model, tokenizer, out, bias=bias)
    foreign = read_model(str(out))
    again = foreign.trained(None)
    assert again.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.model.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert again.model.image_spec == model.image_spec and again.model.text_spec == model.text_spec
    assert torch.equal(again.logit_scale, SCALE)
    assert again.logit_bias is None if bias is None else torch.equal(again.logit_bias, bias)
    assert foreign.notes == [] and foreign.vocabulary == str(out)


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
    export(clip, clip_tokenizer, out)
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
    report = export(clip, clip_tokenizer, out, bias=BIAS)
    assert report.left_out_bias == float(BIAS)
    assert report.certificate is not None and report.certificate.logits < 1e-4
    assert f"{float(BIAS):.4f}" in (out / "README.md").read_text()


def test_an_export_that_is_another_model_is_refused(
    clip: DualEncoder, clip_tokenizer: BytePairTokenizer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf.TO_TRANSFORMERS, "quick_gelu", "gelu")  # the classic mistake
    with pytest.raises(CheckpointError, match="not the same model") as caught:
        export(clip, clip_tokenizer, out)
    difference = float(str(caught.value.got).split()[2].rstrip(","))
    assert difference > 100 * TOLERANCE  # measured 3e-3


@pytest.mark.parametrize("part", ["vision.blocks.1.mlp.fc1.bias", "text.position", "text_projection.weight"])
def test_one_disturbed_weight_is_noticed(
    clip: DualEncoder, clip_tokenizer: BytePairTokenizer, out: Path, part: str
) -> None:
    export(clip, clip_tokenizer, out, verify=False)
    with torch.no_grad():
        clip.get_parameter(part).view(-1)[0] += 0.05
    trained = Trained(model=clip, tokenizer=clip_tokenizer, logit_scale=SCALE).reference()
    with pytest.raises(CheckpointError, match="not the same model"):
        certify(trained, hf.TransformersModel(out))


def test_another_scale_is_noticed(clip: DualEncoder, clip_tokenizer: BytePairTokenizer, out: Path) -> None:
    export(clip, clip_tokenizer, out, verify=False)
    trained = Trained(model=clip, tokenizer=clip_tokenizer, logit_scale=SCALE + 0.001).reference()
    with pytest.raises(CheckpointError, match="logit difference"):
        certify(trained, hf.TransformersModel(out))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Siglip2Config(), "NaFlex"),
        (SiglipConfig(vision_config={"vision_use_head": False}), "vision_use_head=False"),
        (CLIPConfig(text_config={"hidden_act": "relu"}), "hidden_act=relu"),
        (CLIPConfig(vision_config={"num_channels": 4}), "num_channels=4"),
        (BlipConfig(), "blip"),
    ],
    ids=["naflex", "no-head", "activation", "channels", "another-model"],
)
def test_what_our_towers_are_not_is_refused_by_name(config: PreTrainedConfig, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hf.node_of(config, ImageSpec(size=224))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_a_model_that_transformers_made_comes_in_and_goes_out_bitwise(name: str, out: Path) -> None:
    """SigLIP-2 of fixed resolution is a SiglipModel with another vocabulary."""
    torch.manual_seed(3)
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 48, "patch_size": 16}
    text = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 16, "vocab_size": 700 if name == "siglip2" else 500}
    if name == "clip":
        text |= {"bos_token_id": 498, "eos_token_id": 499}
        theirs: Any = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32))
        CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48).save_pretrained(out)
    else:
        text["projection_size"] = 64
        theirs = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(out)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(out)
    foreign = read_model(str(out))
    trained = foreign.trained(None)
    found = certify(trained.reference(), foreign.load())
    assert found.features < 1e-6  # measured 1.6e-7
    again = export_state(
        trained.model, family=foreign.family, logit_scale=trained.logit_scale, logit_bias=trained.logit_bias
    )
    state = theirs.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert type(hf.config_of(trained.model)) is type(theirs.config)
