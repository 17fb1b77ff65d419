"""Retrieval against brute force, with ties, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from embedding_toys import CAPTIONS, ToyEmbedder, batches
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.errors import ConfigError, DataError, VlmError
from vlm_train.evaluation.metrics import on_grid
from vlm_train.evaluation.retrieval import Retrieval
from vlm_train.types import MODALITIES, Batch


def brute_force(all_captions: list[list[str]], k: int) -> tuple[float, float]:
    """Recall in percent, both ways, by sorting; ties by their expectation."""
    embedder = ToyEmbedder()
    images = on_grid(embedder.images(next(batches(all_captions, len(all_captions)))), "images")
    texts = [text for captions in all_captions for text in captions]
    owners = [item for item, captions in enumerate(all_captions) for _ in captions]
    scores = (images @ on_grid(embedder.texts(texts), "texts").T).tolist()

    def credit(values: list[float], right: list[bool]) -> float:
        best = max(value for value, is_right in zip(values, right, strict=True) if is_right)
        above = sum(value > best for value in values)
        tie = [is_right for value, is_right in zip(values, right, strict=True) if value == best]
        places = min(max(0, k - above), len(tie))
        return 1 - math.comb(tie.count(False), places) / math.comb(len(tie), places)

    by_text = [
        credit([row[column] for row in scores], [item == owner for item in range(len(images))])
        for column, owner in enumerate(owners)
    ]
    by_image = [credit(row, [owner == item for owner in owners]) for item, row in enumerate(scores)]
    return 100 * sum(by_text) / len(by_text), 100 * sum(by_image) / len(by_image)


@settings(max_examples=25, deadline=None)
@given(
    all_captions=st.lists(
        st.lists(st.integers(0, 8).map(lambda i: f"item {i}"), min_size=1, max_size=3), min_size=1, max_size=9
    ),
    batch_size=st.integers(1, 4),
)
def test_recall_matches_brute_force(all_captions: list[list[str]], batch_size: int) -> None:
    result = Retrieval(ks=(1, 2, 5)).run(ToyEmbedder(), batches(all_captions, batch_size))
    for k in (1, 2, 5):
        by_text, by_image = brute_force(all_captions, k)
        assert result["text_to_image"][f"R@{k}"] == pytest.approx(by_text, abs=1e-9)
        assert result["image_to_text"][f"R@{k}"] == pytest.approx(by_image, abs=1e-9)
    assert result["num_images"] == len(all_captions)
    assert result["num_pairs"] == sum(map(len, all_captions))


def test_chance_intervals_and_examples() -> None:
    retrieval = Retrieval()
    result = retrieval.run(ToyEmbedder(), batches(CAPTIONS, 5))
    assert result["chance"] == pytest.approx({"R@1": 100 / 22, "R@5": 500 / 22, "R@10": 1000 / 22})
    assert result["chance_image_to_text"]["R@1"] == pytest.approx(
        100 * sum(len(captions) for captions in CAPTIONS) / result["num_pairs"] / 22
    )
    for direction in ("text_to_image", "image_to_text"):
        for key, (low, high) in result["interval_95"][direction].items():
            assert 0 <= low <= result[direction][key] <= high <= 100
    examples = retrieval.examples
    assert examples is not None
    assert examples.similarity.shape == (22, 22)
    assert examples.keys == [f"key{i}" for i in range(22)]
    assert examples.captions == [captions[0] for captions in CAPTIONS]
    caption, hits = examples.searches[0]
    assert caption == "item 0" and len(hits) == 5
    assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)


def test_equal_captions_tie_even_when_their_features_differ_by_rounding() -> None:
    class Noisy(ToyEmbedder):
        calls = 0

        def texts(self, texts):
            self.calls += 1
            features = super().texts(texts)
            return torch.nn.functional.normalize(features + 1e-7 * self.calls * torch.ones_like(features), dim=1)

    captions = [["the same"]] * 6
    result = Retrieval(ks=(1,)).run(Noisy(), batches(captions, 1))
    assert result["image_to_text"]["R@1"] == pytest.approx(100 / 6)


def test_features_that_are_not_finite_are_an_error() -> None:
    class Broken(ToyEmbedder):
        def images(self, batch):
            return super().images(batch) * torch.nan

    with pytest.raises(VlmError, match="Image features cannot be ranked"):
        Retrieval().run(Broken(), batches(CAPTIONS, 4))


def test_an_image_without_a_caption_is_named() -> None:
    with pytest.raises(DataError, match="1 of 3 images have none, first key1"):
        Retrieval().run(ToyEmbedder(), batches([["item 0"], [], ["item 2"]], 2))
    with pytest.raises(DataError, match="nothing to evaluate"):
        Retrieval().run(ToyEmbedder(), iter([]))


def with_sound(all_captions: list[list[str]], there: list[bool]) -> Iterator[Batch]:
    """Batches of which only some rows have a sound; the others' rows hold whatever they hold."""
    for number, batch in enumerate(batches(all_captions, 4)):
        rows = there[4 * number : 4 * number + 4]
        batch["there"] = torch.zeros(4, len(MODALITIES), dtype=torch.bool)
        batch["there"][: len(rows), MODALITIES.index("audio")] = torch.tensor(rows)
        yield batch


def test_texts_find_another_modality_among_the_samples_that_have_it() -> None:
    captions, there = [[f"item {i}"] for i in range(11)], [i % 3 > 0 for i in range(11)]
    result = Retrieval(ks=(1, 2), item="audio").run(ToyEmbedder(2.0), with_sound(captions, there))
    kept = [each for each, is_there in zip(captions, there, strict=True) if is_there]

    class Kept(ToyEmbedder):  # image i of those that are left lies where it lay
        def images(self, batch: Batch) -> torch.Tensor:
            shown = batch["images"].clone()
            numbers = torch.tensor([int(each[0].split()[1]) for each in kept] + [0], dtype=torch.uint8)
            shown[:, 0, 0, 0] = numbers[shown[:, 0, 0, 0].long()]
            return super().images(Batch(images=shown))

    plain = Retrieval(ks=(1, 2)).run(Kept(2.0), batches(kept, 7))
    assert result["text_to_audio"] == plain["text_to_image"] and result["audio_to_text"] == plain["image_to_text"]
    assert result["num_items"] == plain["num_images"] == 7 and result["chance"]["R@1"] == pytest.approx(100 / 7)
    everything = Retrieval(ks=(1, 2), item="audio").run(ToyEmbedder(2.0), with_sound(captions, [True] * 11))  # the twin
    assert everything["num_items"] == 11 and everything["text_to_audio"] != result["text_to_audio"]
    with pytest.raises(DataError, match="nothing to evaluate"):
        Retrieval(item="audio").run(ToyEmbedder(2.0), with_sound(captions, [False] * 11))
    with pytest.raises(ConfigError, match="texts cannot find this"):
        Retrieval(item="smell")
