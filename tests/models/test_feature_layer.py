"""Which layer of an image tower a generative model reads: that of transformers, and no part that it does not read."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generative_toys import draw_weights, logits, loss, make_batch, make_model, make_text
from torch.utils.flop_counter import FlopCounterMode

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.linear import MLPConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.vision.pretrained import HuggingFaceVision
from vlm_train.models.vision.vit import VisionTransformer

SIZES: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A vision model as transformers saves it."""
    torch.manual_seed(0)
    if request.param == "clip":
        network: Any = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))
        transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path)
    else:
        network = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES))
        transformers.SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    draw_weights(network)
    network.save_pretrained(tmp_path)
    return tmp_path


def make_vit() -> VisionTransformer:
    torch.manual_seed(0)
    tower = VisionTransformer(image={"size": 16}, patch_size=8, width=32, num_layers=3, num_heads=2)
    draw_weights(tower)
    return tower


def with_tower(vision: Any, feature_layer: int | None) -> GenerativeModel:
    model = GenerativeModel(vision=vision, connector=partial(MLPConnector), text=make_text(), context_length=48,
                            max_images=2, feature_layer=feature_layer)  # fmt: skip
    draw_weights(model.connector)
    return model


@pytest.mark.parametrize("layer", [None, -1, -2, -3])
def test_what_is_taken_out_of_a_tower_was_never_read(layer: int | None) -> None:
    tower, pixels = make_vit(), torch.randn(2, 3, 16, 16)
    whole, expected, flops = copy.deepcopy(tower), tower.tokens(pixels, layer=layer), tower.tokens_flops(layer=layer)
    for _ in range(2):  # it may be asked twice
        tower.drop_unread(layer)
        assert torch.equal(tower.tokens(pixels, layer=layer), expected) and tower.tokens_flops(layer=layer) == flops
    expected.sum().backward()
    whole.tokens(pixels, layer=layer).sum().backward()
    read = {name for name, parameter in whole.named_parameters() if parameter.grad is not None}
    assert read == {name for name, _ in tower.named_parameters()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole.tokens(pixels[:1], layer=layer)
    assert counter.get_total_flops() == flops
    others = [whole.tokens(pixels, layer=other) for other in (None, -1, -2, -3) if other != layer]
    assert all((other - expected).abs().max() > 0.1 for other in others)


@pytest.mark.parametrize("layer", [None, -1, -2])
def test_a_tower_of_transformers_shows_its_hidden_states(folder: Path, layer: int | None) -> None:
    theirs: Any = transformers.AutoModel.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 16, 16)
    output = theirs(pixels, output_hidden_states=True)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
    tower = HuggingFaceVision(path=str(folder)).eval()
    assert (tower.num_patches, tower.has_class_token) == (4, len(expected[0]) == 5)
    for _ in range(2):
        assert torch.equal(tower.tokens(pixels, layer=layer), expected)
        tower.drop_unread(layer)
    assert tower.tokens_flops() > 0


def test_a_tower_of_transformers_is_run_once_to_be_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, runs = HuggingFaceVision(path=str(folder)).eval(), 0
    forward = tower.network.forward

    def counted(*inputs: Any) -> Any:
        nonlocal runs
        runs += 1
        return forward(*inputs)

    monkeypatch.setattr(tower.network, "forward", counted)
    whole = [tower.tokens_flops() for _ in range(2)]
    tower.drop_unread(-2)
    read = [tower.tokens_flops() for _ in range(2)]
    assert runs == 2 and whole[0] == whole[1] > read[0] == read[1]  # the twin: what was taken out is counted no more


@pytest.mark.parametrize("layer", [None, -1, -2])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_stands_in_a_generative_model_frozen_or_not(folder: Path, layer: int | None, frozen: bool) -> None:
    model, batch = with_tower(HuggingFaceVision(path=str(folder)), layer), make_batch()
    assert model.tokens_per_image == 4
    if frozen:
        model.vision.requires_grad_(False)  # type: ignore[attr-defined]
    loss(model, batch).backward()
    learned = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    expected = [name for name, _ in model.named_parameters() if not (frozen and name.startswith("vision"))]
    assert learned == expected
    assert model.forward_flops(9)["vision"] > 0
    state = model.state_dict()
    again = with_tower(HuggingFaceVision(path=str(folder)), layer)
    again.load_state_dict(state)
    assert torch.equal(logits(again.eval(), batch), logits(model.eval(), batch))


def test_a_generative_model_reads_the_layer_it_was_given() -> None:
    found = {layer: logits(make_model(feature_layer=layer).eval(), make_batch()) for layer in (None, -1, -2)}
    assert all((found[None] - found[layer]).abs().max() > 1e-2 for layer in (-1, -2))
    assert len(make_model(feature_layer=-2).vision.blocks) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("layer", [0, 1, -4, "last", 1.5])
def test_a_layer_that_is_not_there_is_refused(layer: Any, folder: Path) -> None:
    for tower in (make_vit(), HuggingFaceVision(path=str(folder))):
        with pytest.raises(ConfigError, match="no such layer") as caught:
            with_tower(tower, layer)
        assert "to -3" in str(caught.value)


def test_another_network_of_transformers_is_refused(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must show its tokens"):
        with_tower(HuggingFaceVision(path=str(tmp_path)), None)
