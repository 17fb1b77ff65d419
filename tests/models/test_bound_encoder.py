"""Towers beside image and text: which run, what they give, what they are called, and what they cost."""

from __future__ import annotations

import pytest
import torch

from vlm_train.errors import ConfigError
from vlm_train.models.adapt import load_weights, new_towers
from vlm_train.models.bound_encoder import BoundEncoder
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.layers import count_flops
from vlm_train.models.signal import SignalTransformer
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import Batch, TextSpec

SHAPES = {"depth": (1, 16, 16), "audio": (8, 20), "motion": (3, 30)}
PATCHES = {"depth": (8, 8), "audio": (8, 5), "motion": (3, 10)}
SIZES = {"width": 16, "num_layers": 2, "num_heads": 2}


def tower(name: str) -> SignalTransformer:
    return SignalTransformer(reads={"name": name, "shape": SHAPES[name]}, patch=PATCHES[name], **SIZES)


def anchors() -> dict:
    spec = TextSpec(vocab_size=50, context_length=8, pad_id=0, bos_id=1, eos_id=2)
    return {
        "vision": VisionTransformer(image={"size": 16}, patch_size=8, **SIZES),
        "text": TextTransformer(spec=spec, **SIZES),
        "embed_dim": 12,
    }


def make(*names: str) -> BoundEncoder:
    torch.manual_seed(0)
    return BoundEncoder(**anchors(), others={name: tower(name) for name in names}).double()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(3, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    ids = torch.tensor([[1, 7, 2], [1, 9, 2], [1, 3, 2]])
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(images=images, text_ids=ids, text_mask=ids > 0, weights=torch.ones(3), **values)  # type: ignore[typeddict-item]


def test_every_tower_gives_unit_vectors_of_one_space() -> None:
    model = make(*SHAPES)
    outputs = model(batch())
    assert set(outputs) == model.outputs == {f"{name}_features" for name in ("image", "text", *SHAPES)}
    for rows in outputs.values():
        assert rows.shape == (3, 12) and torch.allclose(rows.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(outputs["audio_features"], model.encode_other("audio", batch()["audio"]))
    assert [spec.name for spec in model.modalities] == list(SHAPES)
    plain = DualEncoder(**anchors()).double()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("others.")})
    assert all(torch.equal(rows, outputs[key]) for key, rows in plain(batch()).items())


def test_what_is_not_asked_for_is_not_run_and_does_not_learn() -> None:
    model = make(*SHAPES)
    ran: list[str] = []
    for name, part in {"vision": model.vision, "text": model.text, **model.others}.items():
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.give_only({"image_features", "audio_features"})
    outputs = model(batch())
    assert sorted(ran) == ["audio", "vision"] and set(outputs) == {"image_features", "audio_features"}
    (outputs["image_features"] * outputs["audio_features"]).sum().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in learning} == {"vision", "image_projection", "others"}
    assert not any(name.startswith(("others.depth", "others.motion")) for name in learning)
    assert set(model.forward_flops(3)) == {"vision", "others.audio"}
    assert model.encode_text(batch()["text_ids"], batch()["text_mask"]).shape == (3, 12)  # evaluation still can


def test_values_are_normalised_and_every_one_is_read() -> None:
    plain, normal = tower("motion"), tower("motion")
    normal.load_state_dict(plain.state_dict())
    normal.mean, normal.std = 2.0, 4.0
    values = batch()["motion"].float()
    assert torch.allclose(normal(values * 4 + 2), plain(values), atol=1e-5)
    for name, shape in SHAPES.items():
        signal, values = tower(name), batch()[name].float().requires_grad_()
        signal(values).square().sum().backward()
        assert (values.grad.abs().sum(0) > 0).all() and signal(values).shape == (3, 16)
        assert signal.forward_flops() == count_flops(signal, torch.zeros(1, *shape))


@pytest.mark.parametrize(
    ("reads", "patch"),
    [
        ({"name": "smell", "shape": [8, 20]}, [8, 5]), ({"name": "audio"}, [8, 5]),
        ({"name": "audio", "shape": [8]}, [8]),
        ({"name": "audio", "shape": [8, 20]}, [8, 6]), ({"name": "audio", "shape": [8, 20]}, [0, 5]),
        ({"name": "audio", "shape": [8, 20], "rate": 1}, [8, 5]),
    ],
)  # fmt: skip
def test_a_tower_that_nothing_fits_is_refused(reads: dict, patch: list[int]) -> None:
    with pytest.raises(ConfigError):
        SignalTransformer(reads=reads, patch=patch, **SIZES)


def test_towers_are_named_by_what_they_read() -> None:
    for others in ({}, {"audio": tower("depth")}, {"sound": tower("audio")}):
        with pytest.raises(ConfigError, match="by what they read"):
            BoundEncoder(**anchors(), others=others)
    with pytest.raises(ConfigError, match="no tower"):
        make("audio").encode_other("depth", batch()["depth"])
    with pytest.raises(ConfigError, match="no tower"):
        make("audio").encode_other("audio", batch()["audio"][:, :4])


def test_new_towers_keep_their_first_values_and_nothing_else_may_be_missing() -> None:
    anchor, model = DualEncoder(**anchors()).double(), make("audio", "depth")
    first, given = {key: value.clone() for key, value in model.state_dict().items()}, anchor.state_dict()
    assert new_towers(model, given) == ["audio", "depth"] and new_towers(model, model.state_dict()) == []
    load_weights(model, given, whose="a run")
    for key, value in model.state_dict().items():
        assert torch.equal(value, first[key] if key.startswith("others.") else given[key])
    one = {**given, **{key: value for key, value in first.items() if key.startswith("others.audio.")}}
    assert new_towers(model, one) == ["depth"]
    load_weights(model, one, whose="a run")
    for left_out in ("text.post_norm.weight", "others.audio.projection.weight", "vision.position"):
        torn = {key: value for key, value in one.items() if key != left_out}
        assert left_out not in torn and len(torn) < len(one)
        with pytest.raises(ConfigError, match="missing"):
            load_weights(model, torn, whose="a run")
    with pytest.raises(ConfigError, match="unexpected"):  # towers are not left behind
        load_weights(make("audio"), model.state_dict(), whose="a run")
