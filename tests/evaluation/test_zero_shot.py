"""Zero-shot classification: ensembling as open_clip does it, controls, errors, any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from embedding_toys import LABELS, NAMES, ToyEmbedder, batches, vector

from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.prompts import TEMPLATE_SETS, resolve_templates
from vlm_train.evaluation.zero_shot import ZeroShot

ITEMS = [["unused"]] * len(LABELS)


def test_scores_and_controls_against_brute_force() -> None:
    result = ZeroShot(classes=NAMES, templates="plain").run(ToyEmbedder(), batches(ITEMS, 3, LABELS))
    images = ToyEmbedder().images(next(batches(ITEMS, 12)))
    order = (images @ torch.stack([vector(name) for name in NAMES]).T).argsort(1, descending=True)
    used = [index for index, label in enumerate(LABELS) if label >= 0]
    top1 = [int(order[index, 0]) == LABELS[index] for index in used]
    assert result["top1"] == pytest.approx(100 * sum(top1) / len(used))
    assert result["top5"] == pytest.approx(
        100 * sum(LABELS[index] in order[index, :5].tolist() for index in used) / len(used)
    )
    by_class = [[hit for hit, index in zip(top1, used, strict=True) if LABELS[index] == c] for c in range(7)]
    assert result["macro_top1"] == pytest.approx(100 * sum(sum(hits) / len(hits) for hits in by_class) / 7)
    assert result["macro_top1"] != result["top1"]
    assert result["chance"] == {"top1": pytest.approx(100 / 7), "top5": pytest.approx(500 / 7)}
    assert result["majority_class"] == pytest.approx(100 * 3 / 11)
    assert (result["num_images"], result["num_classes"], result["num_unlabelled"]) == (11, 7, 1)
    assert result["interval_95"][0] < result["top1"] < result["interval_95"][1]


def test_prompts_are_normalised_before_and_after_their_mean() -> None:
    evaluator = ZeroShot(classes=NAMES, templates=["{}", "not {}", "{}!"])
    got = evaluator.class_features(ToyEmbedder())
    prompts = torch.stack([torch.stack([vector(f"{n}"), vector(f"not {n}"), vector(f"{n}!")]) for n in NAMES])
    torch.testing.assert_close(got, F.normalize(prompts.mean(1), dim=1))


def test_parity_with_open_clip_classifier() -> None:
    from open_clip.zero_shot_classifier import build_zero_shot_classifier

    class Rows:
        """open_clip's side of the toy: texts become row numbers of a table."""

        def __init__(self) -> None:
            self.texts: list[str] = []

        def tokenize(self, texts: list[str]) -> torch.Tensor:
            self.texts = list(texts)
            return torch.arange(len(texts))

        def encode_text(self, rows: torch.Tensor, normalize: bool) -> torch.Tensor:
            return ToyEmbedder().texts([self.texts[row] for row in rows.tolist()])

    rows = Rows()
    theirs = build_zero_shot_classifier(rows, rows.tokenize, NAMES, TEMPLATE_SETS["simple"], num_classes_per_batch=3)
    got = ZeroShot(classes=NAMES, templates="simple").class_features(ToyEmbedder())
    torch.testing.assert_close(got.T, theirs, rtol=0, atol=3e-7)  # fp32 unit vectors, measured 6e-8


def test_classes_file_brings_its_own_templates(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"name": "toy", "classes": NAMES, "templates": ["a {}"]}))
    assert ZeroShot(classes=str(path)).templates == ("a {}",)
    assert ZeroShot(classes=str(path), templates="simple").templates == TEMPLATE_SETS["simple"]
    assert ZeroShot(classes=NAMES).templates == TEMPLATE_SETS["generic"]
    path.write_text("[5]")
    with pytest.raises(ConfigError, match="does not hold classes"):
        ZeroShot(classes=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        ZeroShot(classes=str(tmp_path / "absent.json"))


def test_labels_and_names_must_match() -> None:
    with pytest.raises(DataError, match="label 6, with 3 class names"):
        ZeroShot(classes=NAMES[:3]).run(ToyEmbedder(), batches(ITEMS, 4, LABELS))
    with pytest.raises(DataError, match=r"needs labels, and data\.val\.shards has none"):
        ZeroShot(classes=NAMES).run(ToyEmbedder(), batches(ITEMS, 4))
    with pytest.raises(ConfigError, match="repeated: cat"):
        ZeroShot(classes=["cat", "cat", "dog"])


def test_templates_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean simple"):
        resolve_templates("simpel")
    for unusable in (["a photo"], ["{} and {}"], []):
        with pytest.raises(ConfigError, match="placeholder"):
            resolve_templates(unusable)
    assert len(TEMPLATE_SETS["simple"]) == 7


def test_classes_and_templates_may_be_files_of_the_user(tmp_path: Path) -> None:
    """The eighty templates and thousand names of ImageNet come as lists of texts, with {} or {c}."""
    eighty = [f"a photo {number} of a {{c}}." for number in range(79)] + ["{}"]
    (tmp_path / "templates.json").write_text(json.dumps(eighty))
    (tmp_path / "templates.txt").write_text("\n".join(eighty) + "\n\n")
    (tmp_path / "names.txt").write_text("\ufeff" + "\n".join(NAMES), encoding="utf-8")
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    results = []
    for names in ("names.txt", "names.json"):
        for templates in ("templates.txt", "templates.json"):
            evaluator = ZeroShot(classes=str(tmp_path / names), templates=str(tmp_path / templates))
            assert len(evaluator.templates) == 80 and evaluator.templates[3] == "a photo 3 of a {}."
            results.append(evaluator.run(ToyEmbedder(), batches(ITEMS, 3, LABELS)))
    assert results == [ZeroShot(classes=NAMES, templates=eighty).run(ToyEmbedder(), batches(ITEMS, 3, LABELS))] * 4
    assert results[0] != ZeroShot(classes=NAMES, templates="plain").run(ToyEmbedder(), batches(ITEMS, 3, LABELS))


@pytest.mark.parametrize("content", ["[1]", "{}", '"text"', "[" * 100_000, "nonsense"])
def test_a_file_of_something_else_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    for build in (lambda path: ZeroShot(classes=path), resolve_templates):
        with pytest.raises(ConfigError, match=r"x\.json"):
            build(str(tmp_path / "x.json"))
    with pytest.raises(ConfigError, match=r"absent\.txt cannot be read"):
        resolve_templates(str(tmp_path / "absent.txt"))
