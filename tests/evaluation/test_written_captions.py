"""Captions: the published numbers of the scores, their controls, and that ranks and batches change nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from answering_toys import Say, Toy
from embedding_toys import batches
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.scores import counts_of, scores_of
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.captioning import Captions, scores, words
from vlm_train.types import Batch

CAPTIONS = [
    ["A red ball on the grass.", "the red ball lies on green grass"],
    ["Two dogs run on the grass.", "dogs on the grass", "two dogs are running"],
    ["A man isn't looking at the red car."],
    ["A dog looks at the red ball.", "the dog and the red ball"],
    ["The car is on the road.", "a car drives along the road"],
]


SAID = [
    "the red ball on the grass", "two dogs run on grass", "a man is looking at the car",
    "the dog looks at the red ball", "a red car on the road",
]  # fmt: skip


def split_of(captions: list[list[str]], batch_size: int, without: Sequence[int] = ()) -> Iterator[Batch]:
    """Pictures with these captions; samples `without` have none."""
    for batch in batches(captions, batch_size):
        pixels = batch["images"][:, 0, 0, 0].tolist()
        there = [
            int(weight > 0 and pixel not in without) for weight, pixel in zip(batch["weights"], pixels, strict=True)
        ]
        batch["num_images"] = torch.tensor(there)
        yield batch


def run(say: Say, captions: list[list[str]] = CAPTIONS, batch_size: int = 2, without: Sequence[int] = ()) -> dict:
    return Captions().run(Toy(say), split_of(captions, batch_size, without))


def first(picture: int, metadata: dict, prompt: str) -> str:
    return CAPTIONS[picture][0]


def cider_by_hand(said: list[str], captions: list[list[str]], documents: list[list[str]]) -> float:
    """CIDEr-D as its paper writes it (eq. 4, sigma 6), with the document frequencies of other captions."""

    def grams(text: str, length: int) -> Counter[tuple[str, ...]]:
        parts = text.split()
        return Counter(tuple(parts[start : start + length]) for start in range(len(parts) - length + 1))

    def weight(gram: tuple[str, ...], length: int) -> float:
        num = sum(any(gram in grams(text, length) for text in own) for own in documents)
        return math.log(len(documents)) - math.log(max(1, num))

    total = 0.0
    for text, own in zip(said, captions, strict=True):
        for other, length in ((other, length) for other in own for length in range(1, 5)):
            mine, theirs = ({g: num * weight(g, length) for g, num in grams(t, length).items()} for t in (text, other))
            dot = sum(min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in mine.items())
            norms = math.sqrt(sum(v**2 for v in mine.values())) * math.sqrt(sum(v**2 for v in theirs.values()))
            gap = max(0, len(text.split()) - 1) - max(0, len(other.split()) - 1)
            total += 10 / 4 / len(own) * math.exp(-(gap**2) / 72) * (dot / norms if norms else 0.0)
    return 100 * total / len(said)


def bleu_by_hand(said: list[str], captions: list[list[str]]) -> float:
    """Papineni et al. 2002, of the whole set, with the closest length."""
    logs, length, closest = [], 0, 0
    for size in range(1, 5):
        right = num = 0
        for text, own in zip(said, captions, strict=True):
            counts = [
                Counter(tuple(t.split()[n : n + size]) for n in range(len(t.split()) - size + 1)) for t in (text, *own)
            ]
            right += sum(min(num, max(other[gram] for other in counts[1:])) for gram, num in counts[0].items())
            num += counts[0].total()
        logs.append(math.log(right / num))
    for text, own in zip(said, captions, strict=True):
        mine = len(text.split())
        length += mine
        closest += min((abs(len(other.split()) - mine), len(other.split())) for other in own)[1]
    return 100 * math.exp(min(0.0, 1 - closest / length) + sum(logs) / 4)


def test_scores_are_those_of_the_papers_and_frequencies_those_of_the_whole_set() -> None:
    """Measured 1.1e-11 of CIDEr, which is rounded, and 4.8e-9 of BLEU, where the library adds 1e-9 to each number of
    n-grams."""
    captions = [[words(text) for text in own] for own in CAPTIONS]
    said = [words(text) for text in SAID]
    found = scores(said, captions)
    assert found["cider"] == pytest.approx(cider_by_hand(said, captions, captions), abs=1e-9)
    assert found["bleu_4"] == pytest.approx(bleu_by_hand(said, captions), abs=1e-7)
    assert abs(found["cider"] - cider_by_hand(said, captions, captions[:3])) > 1.0  # the twins: of a part of the set,
    parts = [scores([text], [own])["bleu_4"] for text, own in zip(said, captions, strict=True)]
    assert abs(found["bleu_4"] - sum(parts) / len(parts)) > 1.0  # and a mean over pictures


def test_words_are_cut_as_coco_does() -> None:
    said = "A dog\u2019s T-shirt isn't on the men's 3-year-old car, it's 3.5 m; they can't. 'Stop!' They cannot."
    assert words(said) == (
        "a dog 's t-shirt is n't on the men 's 3-year-old car it 's 3.5 m they ca n't stop they can not"
    )
    assert words("...") == ""


def test_a_right_caption_is_best_and_that_of_the_next_picture_and_the_typical_one_are_not() -> None:
    result = run(first)
    assert result["bleu_4"] == pytest.approx(100.0) and result["cider"] > 400.0
    for control in ("shuffled_images", "blind_prior"):
        for name in ("bleu_4", "cider"):
            assert result[control][name] < 0.5 * result[name]
    by_hand = scores(
        *[[words(row[0]) for row in CAPTIONS[1:] + CAPTIONS[:1]], [[*map(words, row)] for row in CAPTIONS]]
    )
    assert result["shuffled_images"] == by_hand
    assert counts_of(result) == {"images": 5, "captions": 10, "unanswerable": 0}
    assert all({"shuffled_images", "blind_prior"} <= score.controls.keys() for score in scores_of(result))
    assert result["examples"][1] == {"key": "key1", "caption": CAPTIONS[1][0], "predicted": CAPTIONS[1][0]}


def test_the_typical_caption_is_never_a_pictures_own() -> None:
    captions = [["a red ball"], ["a red ball"], ["a red ball on a box"], ["seven swans"], ["a red ball"]]
    blind = run(lambda *asked: "", captions)["blind_prior"]
    nearest = ["a red ball on a box"] * 2 + ["a red ball"] * 2 + ["a red ball on a box"]
    assert blind == scores(nearest, captions) != scores(["a red ball"] * 5, captions)


def test_who_says_nothing_and_who_cannot_be_asked_has_nothing() -> None:
    silent = run(lambda *asked: "")
    assert silent["cider"] == silent["bleu_4"] == 0.0 and silent["num_unanswerable"] == 0
    refused = Captions(prompt="once upon a time, and more").run(Toy(first), split_of(CAPTIONS, 2))
    assert refused["cider"] == refused["bleu_4"] == 0.0 and refused["num_unanswerable"] == 5
    assert refused["examples"][0]["predicted"] is None


def test_samples_without_a_picture_are_not_asked_about() -> None:
    heard: list[int] = []
    result = run(lambda picture, *asked: heard.append(picture) or "a dog", without=[1, 2])
    assert heard == [0, 3, 4] and counts_of(result)["images"] == 3
    with pytest.raises(DataError, match="needs pictures"):
        run(first, without=[0, 1, 2, 3])


def test_of_the_first_pictures_as_many_as_are_wanted() -> None:
    result = Captions(max_images=3).run(Toy(first), split_of(CAPTIONS, 2))
    assert {**result, "examples": None} == {**run(first, CAPTIONS[:3]), "examples": None}
    for bad in ({"max_images": 1}, {"prompt": None}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError):
            Captions(**bad)  # type: ignore[arg-type]


TEXTS = st.text(alphabet="ab c", max_size=8)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=2, max_size=6), st.integers(1, 4))
def test_any_texts_have_scores_however_the_split_is_cut(rows: list, batch_size: int) -> None:
    captions = [own for _, own in rows]
    result = run(lambda picture, *asked: rows[picture][0], captions, batch_size)
    assert all(0.0 <= result[name] <= 1000.0 for name in ("cider", "bleu_4"))
    assert result == run(lambda picture, *asked: rows[picture][0], captions, 7)


def everything() -> list:
    """As text, so that equality means equality of every bit."""
    toy = Toy(lambda picture, *asked: CAPTIONS[(picture + picture % 2) % 5][0])
    whole = json.dumps(Captions().run(toy, split_of(CAPTIONS, 2)))
    one = split_of(CAPTIONS, 2)
    mine = [row for batch in one for row, weight in zip(batch["all_captions"], batch["weights"], strict=True) if weight]
    own = scores([words(row[-1]) for row in mine], [[*map(words, row[:1])] for row in mine])["cider"] if mine else 0.0
    return [whole, toy.calls, sum(collectives.gather_objects(own)) / collectives.world_size()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_world_size_gives_the_scores_of_one_process(world_size: int) -> None:
    alone = everything()
    results = run_ranks(everything, world_size)
    assert [result[0] for result in results] == [alone[0]] * world_size
    assert all(result[1] == results[0][1] for result in results) and sum(results[0][1]) == 5
    assert abs(results[0][2] - alone[2]) > 1.0  # the twin: each share with its own frequencies
