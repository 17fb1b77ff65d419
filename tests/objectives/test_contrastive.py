"""InfoNCE and Sigmoid: parity with open_clip, padding rows, ties, precision, and the clamps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_parity import assert_parity, features

from vlm_train.errors import ConfigError
from vlm_train.objectives.base import check_outputs
from vlm_train.objectives.contrastive import Contrastive
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.sigmoid import Sigmoid
from vlm_train.types import Batch

OBJECTIVES = [InfoNCE, Sigmoid]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_parity_with_open_clip_on_one_process(kind: type[Contrastive]) -> None:
    assert_parity(kind(), features(12), 12)


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=25, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_padding_rows_are_absent_as_rows_and_as_columns(kind: type[Contrastive], mask: list[bool], seed: int) -> None:
    rows = features(len(mask), seed, torch.float64)
    rows["weights"] = torch.tensor(mask, dtype=torch.float32)
    keep = rows["weights"] != 0
    kept = {key: value[keep] for key, value in rows.items()}
    objective = kind().double()
    padded, bare = objective.loss(rows), objective.loss(kept)
    assert torch.equal(padded.sum, bare.sum)
    assert padded.count.item() == sum(mask) == objective.count(Batch(weights=rows["weights"])).item()
    assert math.isfinite(padded.sum.item())
    if 0 < sum(mask) < len(mask):  # the twin: padding counted
        assert not torch.allclose(objective.loss({**rows, "weights": torch.ones(len(mask))}).sum, bare.sum)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_rank_of_padding_only_still_has_a_graph(kind: type[Contrastive]) -> None:
    rows = features(3)
    rows["weights"].zero_()
    rows["image_features"].requires_grad_()
    objective = kind()
    objective.loss(rows).sum.backward()
    assert rows["image_features"].grad.abs().sum() == 0
    assert all(parameter.grad.item() == 0 for parameter in objective.parameters())


def test_count_without_weights_is_the_number_of_rows() -> None:
    assert InfoNCE().count(Batch(images=torch.zeros(4, 3, 2, 2))).item() == 4


def test_ties_do_not_pass_for_accuracy() -> None:
    same = F.normalize(torch.ones(8, 16), dim=1)
    rows = {"image_features": same, "text_features": same, "weights": torch.ones(8)}
    hits, count = InfoNCE().loss(rows).metrics["accuracy_image_to_text"]
    assert hits.item() / count.item() == 1 / 8
    cosines = same @ same.T
    assert (cosines.diagonal() >= cosines.amax(1)).sum().item() == 8  # the twin: whoever shares the maximum is right


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_logits_stay_fp32_under_autocast(kind: type[Contrastive]) -> None:
    rows = features(64)
    objective = kind()
    objective.logit_scale.data.fill_(math.log(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective.loss(rows).sum
        product = rows["image_features"] @ rows["text_features"].T
    assert inside.dtype == torch.float32
    assert torch.equal(inside, objective.loss(rows).sum)
    assert product.dtype == torch.bfloat16  # the twin: what autocast does to a bare product


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_bf16_features_are_raised_and_a_cast_temperature_is_refused(kind: type[Contrastive]) -> None:
    rows = features(6, dtype=torch.bfloat16)
    assert kind().loss(rows).sum.dtype == torch.float32
    assert kind().double().loss(rows).sum.dtype == torch.float64
    with pytest.raises(ConfigError, match="cast down"):
        kind().to(torch.bfloat16).loss(rows)


def test_after_step_clamps_the_temperature() -> None:
    objective = InfoNCE(max_scale=50.0)
    for value, expected in ((9.0, math.log(50.0)), (-1.0, 0.0), (2.0, 2.0)):
        objective.logit_scale.data.fill_(value)
        objective.after_step()
        assert objective.logit_scale.item() == pytest.approx(expected)
    free = Sigmoid()
    free.logit_scale.data.fill_(9.0)
    free.after_step()
    assert free.logit_scale.item() == 9.0


def test_parameters_start_as_published_and_survive_the_meta_device() -> None:
    with torch.device("meta"):
        objective = Sigmoid()
    objective.to_empty(device="cpu").reset_parameters()
    assert objective.logit_scale.shape == objective.logit_bias.shape == (1,)
    assert objective.logit_scale.item() == pytest.approx(math.log(10.0))
    assert objective.logit_bias.item() == -10.0
    assert InfoNCE().logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert not InfoNCE(learn_temperature=False).logit_scale.requires_grad
    assert InfoNCE().logit_scale.requires_grad


def test_impossible_temperature_is_refused() -> None:
    with pytest.raises(ConfigError, match="out of range"):
        InfoNCE(init_temperature=0.001)
    with pytest.raises(ConfigError, match="out of range"):
        Sigmoid(init_scale=-1.0)


def test_a_model_without_the_outputs_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="text_features") as caught:
        check_outputs(InfoNCE(), {"image_features", "text_feature"})
    assert "the model has text_feature" in str(caught.value)
    check_outputs(InfoNCE(), {"image_features", "text_features", "attention"})
    assert InfoNCE().requires == {"image_features", "text_features"}
