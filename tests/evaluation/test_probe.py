"""The probe finds what is in the features, and its controls find nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from embedding_toys import ToyEmbedder, ToyTrain, batches
from torch import Tensor

from vlm_train.engine.scores import controls_of, scores_of
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.base import Learner
from vlm_train.evaluation.probe import Probe
from vlm_train.evaluation.zero_shot import ZeroShot
from vlm_train.types import Batch

NUM_CLASSES = 4


class Angles:
    """Image i lies near the axis of class i % 4; training images are 0..99, validation images 100..."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def images(self, batch: Batch) -> Tensor:
        numbers = batch["images"][:, 0, 0, 0].long()
        noise = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(int(n))) for n in numbers])
        return F.normalize(F.one_hot(numbers % NUM_CLASSES, 8) + self.noise * noise, dim=1)


class Train(ToyTrain):
    def __init__(self, labels: list[int]) -> None:
        super().__init__(labels)


def validation(num: int = 100) -> Iterator[Batch]:
    for batch in batches([[]] * num, 30, [n % NUM_CLASSES for n in range(num)]):
        batch["images"] = batch["images"] + 100
        yield batch


def probe(noise: float, labels: list[int], **options) -> dict:
    found = Probe(**options)
    found.fit(Angles(noise), Train(labels))
    return found.run(Angles(noise), validation())


def test_what_is_in_the_features_is_found_and_the_controls_are_at_chance() -> None:
    result = probe(0.3, [n % NUM_CLASSES for n in range(100)], ks=(1, 5), shots=(1, 8))
    scores = {score.name: score for score in scores_of(result)}
    assert list(scores) == [
        "linear top1", "linear macro top1", "neighbours k=1 weighted", "neighbours k=1 plain",
        "neighbours k=5 weighted", "neighbours k=5 plain", "few shot 1-shot", "few shot 8-shot",
    ]  # fmt: skip
    assert all(score.value > 85 and score.chance == 25.0 for score in scores.values())
    assert scores["few shot 8-shot"].value > scores["few shot 1-shot"].value
    assert result["spread"]["1-shot"] > result["spread"]["8-shot"] > 0
    controls = controls_of(result)
    assert controls.pop("majority_class") == 25.0
    assert set(controls) == {f"shuffled_labels_{name}" for name in ("linear", "neighbours", "few_shot")}
    assert all(value < 60 for value in controls.values())
    assert (result["num_images"], result["num_train_images"], result["num_classes"]) == (100, 100, 4)
    low, high = result["interval_95"]["linear"]["top1"]
    assert low < result["linear"]["top1"] < high


def test_features_without_content_give_chance_whatever_the_classifier() -> None:
    class Constant(Angles):
        def images(self, batch: Batch) -> Tensor:
            return F.normalize(torch.ones(len(batch["images"]), 8), dim=1)

    found = Probe(ks=(1, 5), shots=(2,))
    found.fit(Constant(0), Train([n % NUM_CLASSES for n in range(100)]))
    result = found.run(Constant(0), validation())
    assert [score.value for score in scores_of(result)] == pytest.approx([25.0] * 7)


def test_labels_that_training_never_showed_are_wrong_and_counted() -> None:
    result = probe(0.1, [n % NUM_CLASSES if n % NUM_CLASSES < 3 else -1 for n in range(100)], ks=(1,), shots=(1,))
    assert (result["num_classes"], result["num_unseen"], result["num_train_images"]) == (3, 25, 75)
    assert result["linear"]["top1"] == 75.0 and result["chance"] == pytest.approx(100 / 3)


def test_what_a_probe_cannot_learn_from() -> None:
    with pytest.raises(DataError, match=r"data\.train\.shards has none"):
        probe(0.1, [-1] * 10)
    for labels in ([2] * 10, [0, 1, 2]):
        with pytest.raises(DataError, match="two classes at least"):
            probe(0.1, labels)
    for options in ({"ks": []}, {"ks": [0]}, {"shots": [0]}, {"draws": 0}, {"temperature": 0}):
        with pytest.raises(ConfigError):
            Probe(**options)


def test_who_learns_is_known() -> None:
    assert isinstance(Probe(), Learner) and not isinstance(ZeroShot(classes=["a", "b"]), Learner)
    assert not isinstance(ToyEmbedder(), Learner)
