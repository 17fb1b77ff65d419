"""Composition: exact shares with ties, per type, and controls that see through pairs which give the answer away."""

from __future__ import annotations

import math

import pytest
from embedding_toys import ToyEmbedder, ToyTrain, batches
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.engine.scores import scores_of
from vlm_train.errors import DataError
from vlm_train.evaluation.composition import Composition, pairs_of
from vlm_train.evaluation.language import WordPairs


def run(metadata: list[dict], captions: list[str] | None = None, noise: float = 0.5) -> dict:
    composition = Composition()
    composition.fit(ToyEmbedder(), ToyTrain([], captions or ["item one"]))
    return composition.run(ToyEmbedder(noise), batches([["item 0"]] * len(metadata), 3, metadata=metadata))


def contrast(true: str, false: str, kind: str) -> dict[str, str]:
    return {"true": true, "false": false, "type": kind}


def test_shares_by_type_with_ties_and_what_is_held_out() -> None:
    metadata = [
        {"contrasts": [contrast("item 0", "x", "order"), contrast("x", "item 0", "count")], "negatives": ["x"]},
        {"contrasts": [contrast("item 1", "x", "order"), contrast("same", "same", "count")], "negatives": ["x"]},
        {},
        {"contrasts": [contrast("item 3", "x", "order")], "negatives": ["x"]},
    ]
    result = run(metadata)
    assert result["accuracy"] == {"all": 70.0, "macro": 62.5, "count": 25.0, "order": 100.0}
    assert (result["num_pairs"], result["num_images"]) == (5, 3)
    assert result["held_out_types"] == ["count"]
    metadata[0]["negatives"] = metadata[1]["negatives"] = metadata[3]["negatives"] = ["item 0", "same"]
    assert run(metadata)["held_out_types"] == ["order"]
    score = next(score for score in scores_of(result) if score.metric == "order")
    assert score.chance == 50.0 and set(score.controls) == {"blind", "shuffled_images"}
    assert score.interval is not None and score.interval[0] == pytest.approx(43.85, abs=0.01)  # Wilson, 3 of 3


def test_the_wrong_image_gives_another_answer() -> None:
    """Image i prefers "item i"; the next image does not know it."""
    metadata = [{"contrasts": [contrast(f"item {n}", f"item {(n + 1) % 6}", "order")]} for n in range(6)]
    result = run(metadata, noise=0.0)
    assert result["accuracy"]["all"] == 100.0 and result["shuffled_images"]["all"] == 0.0


def test_pairs_that_language_alone_answers_are_told() -> None:
    captions = ["the cat sat on the mat", "a dog sat on the mat", "the dog sat on a cat"]
    plain = [{"contrasts": [contrast("the dog sat on the mat", "mat the on sat dog the", "order")]}] * 4
    assert run(plain, captions)["blind"]["order"] == 100.0
    fair = [{"contrasts": [contrast(*words, "attribute")]} for words in (("a dog", "a dog"), ("a cat", "a cat"))]
    assert run(fair, captions)["blind"]["attribute"] == 50.0


def test_negatives_stand_beside_the_first_caption() -> None:
    result = run([{"negatives": ["x", "y"]}, {"negatives": []}, {}])
    assert result["num_pairs"] == 2 and set(result["accuracy"]) == {"all", "macro", "negatives"}
    for metadata in ([{}], [{"negatives": []}]):
        with pytest.raises(DataError, match="nearly right"):
            run(metadata)


@pytest.mark.parametrize(
    "bad", [{"contrasts": [{"true": "a"}]}, {"contrasts": 5}, {"negatives": [5]}, {"contrasts": [3]}]
)
def test_a_sample_whose_pairs_are_none_is_named(bad: dict) -> None:
    with pytest.raises(DataError, match="key1: "):
        run([{"negatives": ["x"]}, bad])


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["contrasts", "negatives"]), st.none() | st.lists(st.none() | st.text())))
def test_any_metadata_gives_pairs_or_one_of_few_errors(metadata: dict) -> None:
    try:
        pairs = pairs_of(metadata, ["caption"])
    except (TypeError, KeyError, AttributeError, ValueError):
        return
    assert all(isinstance(pair.false, str) for pair in pairs)


def test_word_pairs_are_probabilities() -> None:
    """Of all that can follow a word, one unknown word included, the probabilities add up to one."""
    model = WordPairs(["A dog, a cat.", "a dog"])
    words = ["a", "dog", ",", "cat", ".", "", "never seen"]
    for before in ("", "a", "dog"):
        assert math.fsum(model._probability(before, word) for word in words) == pytest.approx(1.0)
    assert model.score("a dog") > model.score("dog a") and model.score("a dog") > model.score("a dog a dog")
    assert WordPairs([]).score("anything at all") < 0
