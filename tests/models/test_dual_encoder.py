"""The two-tower model: unit features in the right precision, exact FLOPs, and errors that name the mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from vlm_train.errors import ConfigError
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import Batch, Model, TextSpec

SPEC = TextSpec(vocab_size=50, context_length=8, pad_id=47, bos_id=48, eos_id=49)
FULL = TextSpec(vocab_size=50, context_length=8, pad_id=47, bos_id=48, eos_id=49, pad_to_max=True)


def make_model(
    *, pool: str = "cls", text_pool: str = "eos", causal: bool = True, spec: TextSpec = SPEC, **changes: Any
) -> DualEncoder:
    torch.manual_seed(0)
    vision = VisionTransformer(image={"size": 32}, patch_size=8, width=32, num_layers=2, num_heads=2, pool=pool)
    text = TextTransformer(spec=spec, width=16, num_layers=2, num_heads=2, pool=text_pool, causal=causal)
    return DualEncoder(vision=vision, text=text, **{"embed_dim": 12, **changes})


def make_batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, 47, (size, 8), generator=generator)
    ids[:, 0], ids[:, -1] = 48, 49
    return {"images": images, "text_ids": ids, "text_mask": torch.ones(size, 8, dtype=torch.bool)}


def test_features_are_of_unit_length_and_as_declared() -> None:
    model, batch = make_model(), make_batch()
    as_model: Model = model
    outputs = as_model(batch)
    assert outputs.keys() == model.outputs == {"image_features", "text_features"}
    for features in outputs.values():
        assert features.shape == (4, 12) and features.dtype == torch.float32
        assert (features.norm(dim=1) - 1).abs().max() < 1e-6
    assert all(hasattr(model, name) for name in model.forward_methods)
    assert model.image_spec == model.vision.image_spec and model.text_spec == SPEC


def test_bytes_and_normalised_floats_are_the_same_image() -> None:
    model, batch = make_model(), make_batch()
    images = batch["images"]
    assert torch.equal(model.encode_image(images), model.encode_image(model.normalize(images)))
    assert not torch.allclose(model.encode_image(images), model.encode_image(images.float()), atol=1e-3)


def test_features_are_wide_whatever_the_precision() -> None:
    model, batch = make_model(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(batch)["image_features"]
    assert low.dtype == torch.float32 and (low.norm(dim=1) - 1).abs().max() < 1e-6
    assert model.double()(batch)["image_features"].dtype == torch.float64
    assert model.bfloat16()(batch)["text_features"].dtype == torch.float32


def test_a_part_of_a_batch_gives_that_part_of_the_features() -> None:
    model, batch = make_model().double(), make_batch()
    part: Batch = {"images": batch["images"][1:3], "text_ids": batch["text_ids"][1:3],
                   "text_mask": batch["text_mask"][1:3]}  # fmt: skip
    for name, features in model(batch).items():
        assert torch.allclose(model(part)[name], features[1:3], atol=1e-12)


def test_every_parameter_gets_a_gradient() -> None:
    model = make_model()
    outputs = model(make_batch())
    sum((features * torch.randn_like(features)).sum() for features in outputs.values()).backward()  # type: ignore
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "kind",
    [
        {"pool": "cls", "text_pool": "eos"},
        {"pool": "mean", "text_pool": "mean", "causal": False},
        {"pool": "map", "text_pool": "last", "causal": False, "spec": FULL, "text_bias": True},
        {"pool": "map", "text_pool": "eos", "embed_dim": 32, "image_projection": "none"},
    ],
    ids=lambda kind: f"{kind['pool']}-{kind['text_pool']}",
)
def test_flops_are_those_that_torch_counts(kind: dict[str, Any]) -> None:
    model, batch = make_model(**kind), make_batch(1)
    with torch.no_grad(), FlopCounterMode(display=False) as vision:
        model.encode_image(batch["images"])
    with torch.no_grad(), FlopCounterMode(display=False) as text:
        model.encode_text(batch["text_ids"], batch["text_mask"])
    assert model.forward_flops(8) == {"vision": vision.get_total_flops(), "text": text.get_total_flops()}


@pytest.mark.parametrize(
    ("vision", "text", "embed_dim", "published"),
    [
        ((32, 768, 12, 12), (512, 12, 8), 512, 14.78),
        ((16, 768, 12, 12), (512, 12, 8), 512, 41.09),
        ((14, 1024, 24, 16), (768, 12, 12), 768, 175.33),
        ((14, 1280, 32, 16), (1024, 24, 16), 1024, 381.68),
    ],
    ids=["B/32", "B/16", "L/14", "H/14"],
)
def test_flops_agree_with_the_published_table(
    vision: tuple[int, int, int, int], text: tuple[int, int, int], embed_dim: int, published: float
) -> None:
    """open_clip's table of GFLOPs computes every position of the last blocks; ours is less by exactly that."""
    spec = TextSpec(vocab_size=49408, context_length=77, pad_id=0, bos_id=49406, eos_id=49407)
    with torch.device("meta"):
        patch_size, width, num_layers, num_heads = vision
        model = DualEncoder(
            vision=VisionTransformer(
                image={"size": 224}, patch_size=patch_size, width=width, num_layers=num_layers, num_heads=num_heads
            ),
            text=TextTransformer(spec=spec, width=text[0], num_layers=text[1], num_heads=text[2]),
            embed_dim=embed_dim,
        )
    skipped = 0.0
    for tower, num_tokens in ((model.vision, model.vision.position.shape[0]), (model.text, 77)):
        skipped += tower.blocks[-1].forward_flops(num_tokens) - tower.blocks[-1].forward_flops(num_tokens, num_read=1)
    executed = sum(model.forward_flops(77).values())
    assert (executed + skipped) / 1e9 == pytest.approx(published, abs=0.006)
    assert executed / 1e9 < published - 0.5


def test_weights_saved_and_loaded_give_the_same_bits(tmp_path: Path) -> None:
    model, batch = make_model(), make_batch()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with torch.device("meta"):
        again = make_model()
    again.to_empty(device="cpu")
    for module in again.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not torch.equal(again(batch)["image_features"], model(batch)["image_features"])
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    for name, features in model(batch).items():
        assert torch.equal(again(batch)[name], features)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit the vision tower") as caught:
        make_model(image_projection="none")
    assert "model.embed_dim=32" in str(caught.value)
    with pytest.raises(ConfigError, match="shape that the vision tower reads"):
        make_model().encode_image(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
