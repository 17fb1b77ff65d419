"""CoCa's model: what a token may see, open_clip's numbers, exact FLOPs, and captions that come from the picture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from captioner_toys import make_batch, make_captioner, open_clip_coca, renamed
from torch.utils.flop_counter import FlopCounterMode

from vlm_train.errors import ConfigError
from vlm_train.models import attention, layers
from vlm_train.models.captioner import Captioner
from vlm_train.objectives.captioning import Captioning
from vlm_train.types import Batch, Model


def test_outputs_are_as_declared_and_one_pass_says_what_the_towers_say() -> None:
    model, batch = make_captioner(), make_batch(5)
    as_model: Model = model
    outputs = as_model(batch)
    assert outputs.keys() == model.outputs
    assert outputs["caption_hidden"].shape == (5, 10, 16) and outputs["caption_vocabulary"].shape == (50, 16)
    images, texts = model.encode_image(batch["images"]), model.encode_text(batch["text_ids"], batch["text_mask"])
    assert torch.allclose(outputs["image_features"], images, atol=1e-12)
    assert torch.allclose(outputs["text_features"], texts, atol=1e-12)  # whose last block reads one position


def logits(model: Any, batch: Batch) -> torch.Tensor:
    outputs = model(batch)
    return outputs["caption_hidden"] @ outputs["caption_vocabulary"].T


def all_seeing(model: Captioner) -> Captioner:
    """The twin: every attention sees the future."""
    twin = copy.deepcopy(model)
    for part in twin.modules():
        if isinstance(part, layers.Attention):
            part.attend = lambda *heads, mask, causal: attention.sdpa(*heads, mask=mask, causal=False)
    return twin


def test_a_later_token_cannot_change_an_earlier_logit() -> None:
    model, batch = make_captioner(), make_batch(5)
    for position in range(1, 10):
        other = Batch(**batch)
        other["text_ids"] = batch["text_ids"].clone()
        other["text_ids"][:, position] = (other["text_ids"][:, position] + 7) % 48
        before, after = logits(model, batch), logits(model, other)
        assert torch.equal(before[:, :position], after[:, :position])
        real = batch["text_mask"][:, position]
        assert not real.any() or (before[:, position] - after[:, position])[real].abs().amax(1).min() > 1e-3
        changes = logits(all_seeing(model), batch)[:, :position] - logits(all_seeing(model), other)[:, :position]
        assert changes.abs().max() > 1e-6


def test_no_token_of_a_caption_sees_the_class_token() -> None:
    model, batch = make_captioner(), make_batch(5)
    before = model(batch)
    with torch.no_grad():
        model.text.class_token.add_(torch.arange(16))
    after, real = model(batch), batch["text_mask"]
    assert torch.equal(before["caption_hidden"][real], after["caption_hidden"][real])
    assert not torch.allclose(before["text_features"], after["text_features"], atol=1e-3)


def test_the_length_of_the_padding_changes_nothing() -> None:
    model, batch = make_captioner(), make_batch(6, longest=5)
    longer = Batch(**batch)
    longer["text_ids"] = torch.nn.functional.pad(batch["text_ids"], (0, 3), value=9)
    longer["text_mask"] = torch.nn.functional.pad(batch["text_mask"], (0, 3))
    short, long, real = model(batch), model(longer), batch["text_mask"]
    assert torch.allclose(short["text_features"], long["text_features"], atol=1e-12)
    assert torch.allclose(short["caption_hidden"][real], long["caption_hidden"][:, :7][real], atol=1e-12)
    longer["text_mask"] = torch.ones_like(longer["text_mask"])  # the twin: padding taken for text
    assert not torch.allclose(short["text_features"], model(longer)["text_features"], atol=1e-3)


def test_the_numbers_are_open_clips() -> None:
    theirs, ours, batch = open_clip_coca(), make_captioner().float(), make_batch(6)
    ours.load_state_dict(renamed(theirs))
    images, real = ours.normalize(batch["images"]), batch["text_mask"][:, 1:]
    with torch.no_grad():
        mine = ours(batch)
        theirs.text.correct_cls_mask = True
        other = theirs(images, batch["text_ids"])
        theirs.text.correct_cls_mask = False
        published = theirs(images, batch["text_ids"])
    # fp32; measured 1e-7, and 1.4e-6 of logits up to 4
    assert (mine["image_features"] - other["image_features"].squeeze(1)).abs().max() < 1e-5
    assert (mine["text_features"] - other["text_features"]).abs().max() < 1e-5
    difference = (mine["caption_hidden"] @ mine["caption_vocabulary"].T)[:, :-1] - other["logits"]
    assert difference[real].abs().max() < 1e-5
    # the twin: the mask of its published weights, off by one token, shows the class token one of the padding
    assert (mine["text_features"] - published["text_features"]).abs().max() > 1e-3


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_flops_are_those_that_torch_counts(patch_dropout: float) -> None:
    model, batch = make_captioner(patch_dropout=patch_dropout), make_batch(1)
    batch["text_mask"] = torch.ones_like(batch["text_mask"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Captioning()(model, batch)
    assert sum(model.forward_flops(10).values()) == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval().encode_image(batch["images"])
    assert model.forward_flops(10)["vision"] == counter.get_total_flops()


def test_every_parameter_learns_and_a_build_on_the_meta_device_has_them_all() -> None:
    model = make_captioner()
    outputs = model(make_batch(3))
    sum((value * torch.randn_like(value)).sum() for value in outputs.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.device("meta"):
        shapes = make_captioner()
    assert {name: value.shape for name, value in shapes.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    filled = shapes.to_empty(device="cpu")
    for module in filled.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.isfinite(value).all() and value.abs().max() < 10 for value in filled.state_dict().values())


def test_hard_captions_are_compared_and_not_written() -> None:
    model, batch = make_captioner(), make_batch(6)
    fewer = Batch(**batch)
    fewer["images"] = batch["images"][:2]
    outputs = model(fewer)
    assert outputs["text_features"].shape == (6, 16) and outputs["caption_hidden"].shape == (2, 10, 16)
    assert torch.allclose(outputs["caption_hidden"], model(batch)["caption_hidden"][:2], atol=1e-12)


def test_captions_are_learned_from_the_picture() -> None:
    model, batch, objective = make_captioner(), make_batch(12, longest=4), Captioning()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        output = objective(model, batch)
        (output.sum / output.count).backward()
        optimizer.step()
    shuffled = Batch(**batch)
    shuffled["images"] = batch["images"].roll(1, 0)
    right, wrong = ((objective(model, rows).sum / objective.count(rows)).item() for rows in (batch, shuffled))
    assert right < 0.7 and wrong > right + 1, (right, wrong)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text": {"pool": "eos"}}, "pool=eos"),
        ({"text": {"width": 32}}, "TextTransformer of width 32"),
        ({"vision": {"width": 32}}, "PooledVision of width 32"),
        ({"vision": {"num_queries": 0}}, "num_queries=0"),
        ({"text": {"causal": False}}, "causal=false"),
        ({"embed_dim": 8, "patch_dropout": 1.0}, "patch_dropout=1.0"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_captioner(**changes)
    assert told in str(caught.value) and caught.value.remedy


def test_a_tower_without_tokens_is_refused() -> None:
    model: Any = make_captioner()
    with pytest.raises(ConfigError, match="cannot go on from these towers"):
        Captioner(vision=model.vision.tower, text=model.text, decoder=model.decoder, embed_dim=4)
