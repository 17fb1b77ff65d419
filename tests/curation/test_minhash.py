"""5-grams and MinHash: sets and similarity against those of Python, how often bands meet against the formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.curation import minhash
from vlm_train.curation.texts import normalised

TEXTS = st.lists(st.text(st.sampled_from("ab é猫𝄞"), max_size=12), min_size=1, max_size=8)
NUM_PAIRS, SIZE = 4000, 60


def grams(text: str) -> set[str]:
    return {text[start : start + 5] for start in range(max(1, len(text) - 4))}


def of(sets: minhash.Sets, number: int) -> set[int]:
    hashes, starts = sets
    return set(hashes[starts[number] : starts[number + 1]].tolist())


@given(texts=TEXTS)
def test_grams_are_those_of_each_text_alone(texts: list[str]) -> None:
    sets = minhash.gram_sets(texts)
    assert np.diff(sets[1]).tolist() == [len(grams(text)) for text in texts]
    alone = [of(minhash.gram_sets([text]), 0) for text in texts]
    assert [of(sets, number) for number in range(len(texts))] == alone


@given(texts=TEXTS, seed=st.integers(0, 99))
def test_similarity_is_jaccards(texts: list[str], seed: int) -> None:
    sets, random = minhash.gram_sets(texts), np.random.default_rng(seed)
    first, second = random.integers(0, len(texts), (2, 20))
    found = minhash.similarity(minhash.chosen(sets, first), minhash.chosen(sets, second))
    pairs = [(grams(texts[a]), grams(texts[b])) for a, b in zip(first, second, strict=True)]
    assert found.tolist() == [len(a & b) / len(a | b) for a, b in pairs]


def pairs_of(shared: int, seed: int) -> tuple[minhash.Sets, minhash.Sets]:
    """Random sets of 60 that share so many."""
    random = np.random.default_rng(seed)
    common = random.integers(0, 1 << 48, (NUM_PAIRS, shared), dtype=np.uint64)
    sides = [
        np.sort(np.concatenate([common, random.integers(0, 1 << 48, (NUM_PAIRS, SIZE - shared), np.uint64)], 1), 1)
        for _ in range(2)
    ]
    starts = np.arange(NUM_PAIRS + 1) * SIZE
    return (sides[0].ravel(), starts), (sides[1].ravel(), starts)


def expected(similarity: float, num_rows: int = minhash.NUM_ROWS) -> float:
    return 1 - (1 - similarity**num_rows) ** minhash.NUM_BANDS


@pytest.mark.parametrize("shared", [36, 45, 49, 53, 57])  # similarity 0.43, 0.6, 0.69, 0.79, 0.90
def test_bands_meet_as_often_as_the_formula_says(shared: int) -> None:
    similarity = shared / (2 * SIZE - shared)
    first, second = (minhash.bands(side) for side in pairs_of(shared, seed=shared))
    found = (first == second).any(axis=1).mean()
    chance = expected(similarity)
    assert abs(found - chance) < 4 * np.sqrt(chance * (1 - chance) / NUM_PAIRS) + 1 / NUM_PAIRS
    twin = expected(similarity, num_rows=7)  # bands of seven would meet more often
    if 0.05 < chance < 0.95:
        assert abs(found - twin) > 4 * np.sqrt(twin * (1 - twin) / NUM_PAIRS)


def test_every_minimum_meets_as_often_as_the_sets_are_similar() -> None:
    """The formula takes minima that are independent: no two of the 112 functions may order alike."""
    assert most_correlated(minhash._ordered) < 6  # standard deviations of 4,000 pairs; measured: 4.3
    related = minhash._FACTORS[0, 0] * (2 * np.arange(112, dtype=np.uint64).reshape(14, 8) + np.uint64(1))
    assert most_correlated(lambda hashes, band, number: hashes * related[band, number]) > 15  # measured: 22


def most_correlated(ordered: Callable[[np.ndarray, int, int], np.ndarray]) -> float:
    """The largest correlation of any two minima being equal, which are so in 0.6 of the pairs."""
    sides = pairs_of(45, seed=1)
    every = [(band, number) for band in range(minhash.NUM_BANDS) for number in range(minhash.NUM_ROWS)]
    minima = [
        np.stack([np.minimum.reduceat(ordered(hashes, *each), starts[:-1]) for each in every])
        for hashes, starts in sides
    ]
    equal = minima[0] == minima[1]
    assert np.abs(equal.mean(axis=1) - 0.6).max() < 5 * np.sqrt(0.24 / NUM_PAIRS)
    return float(np.abs(np.corrcoef(equal.astype(float)) - np.eye(len(equal))).max() * np.sqrt(NUM_PAIRS))


@pytest.mark.parametrize("num", [0, 1, 511, 513, (1 << 16) + 3])
def test_blocks_change_nothing(num: int) -> None:
    texts = [f"caption {number % 700}" for number in range(num)]
    found = minhash.bands(minhash.gram_sets(texts))
    assert found.shape == (num, minhash.NUM_BANDS)
    for number in {0, num // 2, num - 1} if num else set():
        assert np.array_equal(found[number], minhash.bands(minhash.gram_sets([texts[number]]))[0])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("  A Cat,\n on the MAT!! ", "a cat on the mat"),
        ("\uff26\uff55\uff4c\uff4c—width ﬁne", "full width fine"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("!?", ""),
        ("🎉 + 1", "🎉 + 1"),
    ],
)
def test_the_form_in_which_captions_are_compared(caption: str, expected: str) -> None:
    assert normalised(caption) == expected
    assert normalised(normalised(caption)) == expected
