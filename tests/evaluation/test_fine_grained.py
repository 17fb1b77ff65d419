"""What each class is taken for, against a loop; siblings by name and by hierarchy."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from embedding_toys import LABELS, NAMES, ToyEmbedder, batches, vector

from vlm_train.errors import ConfigError
from vlm_train.evaluation.fine_grained import FineGrained
from vlm_train.evaluation.zero_shot import ZeroShot

ITEMS = [["unused"]] * len(LABELS)
GROUPS = {"low": NAMES[:3], "high": NAMES[3:]}


def run(**options) -> dict:
    return FineGrained(classes=NAMES, templates="plain", **options).run(ToyEmbedder(), batches(ITEMS, 3, LABELS))


def predicted() -> dict[int, list[int]]:
    images = ToyEmbedder().images(next(batches(ITEMS, 12)))
    order = (images @ torch.stack([vector(name) for name in NAMES]).T).argmax(1).tolist()
    found: dict[int, list[int]] = {}
    for answer, label in zip(order, LABELS, strict=True):
        found.setdefault(label, []).extend([answer] if label >= 0 else [])
    return {label: answers for label, answers in found.items() if label >= 0}


def test_classes_are_described_as_a_loop_does() -> None:
    result = run(siblings=2)
    names = torch.stack([vector(name) for name in NAMES])
    order = (names @ names.T).argsort(1, descending=True)
    mistakes = hits = 0
    assert [row["class"] for row in result["classes"]] == NAMES
    for row in result["classes"]:
        label = NAMES.index(row["class"])
        answers, siblings = predicted()[label], order[label, 1:3].tolist()
        wrong = [answer for answer in answers if answer != label]
        mistakes, hits = mistakes + len(wrong), hits + sum(answer in siblings for answer in wrong)
        assert row["accuracy"] == pytest.approx(100 * answers.count(label) / len(answers))
        most = max(Counter(wrong).values(), default=0)
        assert row["rate"] == pytest.approx(100 * most / len(answers))
        if most:
            other = NAMES.index(row["mistaken_for"])
            assert wrong.count(other) == most and row["is_sibling"] == (other in siblings)
        else:
            assert row["mistaken_for"] is None
    assert mistakes > 2 and result["mistakes_on_siblings"] == pytest.approx(100 * hits / mistakes)
    plain = ZeroShot(classes=NAMES, templates="plain").run(ToyEmbedder(), batches(ITEMS, 3, LABELS))
    assert (result["top1"], result["macro_top1"]) == pytest.approx((plain["top1"], plain["macro_top1"]))
    assert result["among_siblings"] >= result["macro_top1"]
    assert result["chance"]["among_siblings"] == pytest.approx(100 / 3)
    assert result["chance"]["mistakes_on_siblings"] == pytest.approx(100 * 2 / 6)


def test_a_hierarchy_gives_siblings_and_a_coarse_score() -> None:
    result = run(groups=GROUPS)
    group = lambda label: label < 3  # noqa: E731
    answers = [(label, answer) for label, found in predicted().items() for answer in found]
    coarse = sum(group(label) == group(answer) for label, answer in answers) / len(answers)
    assert result["coarse_top1"] == pytest.approx(100 * coarse)
    chance = sum(3 / 7 if group(label) else 4 / 7 for label, _ in answers) / len(answers)
    assert result["chance"]["coarse_top1"] == pytest.approx(100 * chance)
    for groups in ({"low": NAMES[:3]}, {"all": [*NAMES, NAMES[0]]}, {"all": [*NAMES, "other"]}):
        with pytest.raises(ConfigError, match="every class once"):
            run(groups=groups)


def test_a_model_that_knows_nothing_is_at_chance_in_every_score() -> None:
    class Constant(ToyEmbedder):
        def images(self, batch):
            return vector("one").expand(len(batch["images"]), -1)

        def texts(self, texts):
            return vector("one").expand(len(texts), -1)

    result = FineGrained(classes=NAMES, templates="plain", groups=GROUPS).run(Constant(), batches(ITEMS, 3, LABELS))
    for name, chance in result["chance"].items():
        if name != "mistakes_on_siblings":
            assert result[name] == pytest.approx(chance, abs=1e-6), name  # a seventh in steps of 2^-36
