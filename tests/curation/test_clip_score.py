"""CLIP score and exact shares: the cosine, ties, the order of rows, what cannot be read."""

from __future__ import annotations

from pathlib import Path

import _pairs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation.ranks import highest, num_of_share
from vlm_train.curation.scores import NUM_BINS, Score, cosines, histogram
from vlm_train.errors import ConfigError

VALUES = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.25, 0.5, np.inf]), min_size=1, max_size=30)


def uids_of(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 16), dtype=np.uint8)


def at_or_above(values: np.ndarray, num: int) -> np.ndarray:
    """The wrong twin: all that reach the value of the last that is kept."""
    return values >= np.sort(values)[::-1][num - 1] if num else np.zeros(len(values), bool)


@settings(deadline=None)
@given(values=VALUES, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_exactly_so_many_are_highest_whatever_the_order(values: list[float], share: float, seed: int) -> None:
    found, uids = np.array(values), uids_of(len(values))
    num = num_of_share(share, len(values))
    kept = highest(found, uids, num)
    by_loops = sorted(range(len(values)), key=lambda row: (-values[row], bytes(uids[row])))[:num]
    assert sorted(by_loops) == np.flatnonzero(kept).tolist()
    order = np.random.default_rng(seed).permutation(len(values))
    assert np.array_equal(highest(found[order], uids[order], num), kept[order])


def test_a_threshold_alone_keeps_too_many_of_ties() -> None:
    values = np.array([0.1, 0.5, 0.5, 0.5, 0.9])
    assert highest(values, uids_of(5), 2).sum() == 2
    assert at_or_above(values, 2).sum() == 4


@pytest.mark.parametrize(
    ("share", "num", "expected"), [(0.29, 100, 29), (0.3, 10, 3), (0.5, 3, 2), (0.1, 4, 0), (0.07, 100, 7)]
)
def test_a_share_is_what_its_decimals_say(share: float, num: int, expected: int) -> None:
    assert num_of_share(share, num) == expected


def test_some_share_is_not_what_its_binary_fraction_says() -> None:
    assert any(int(share / 100 * 100) != num_of_share(share / 100, 100) for share in range(1, 100))


def features(num: int, seed: int, dim: int = 8) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(num, dim))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_scores_are_cosines_and_no_batch_changes_a_bit() -> None:
    images, captions = (features(3000, seed, 512).astype(np.float32) for seed in (0, 1))
    rows = np.arange(3000)
    whole = cosines(images, captions, rows)
    expected = (images.astype(np.float64) * captions).sum(1) / (
        np.linalg.norm(images.astype(np.float64), axis=1) * np.linalg.norm(captions.astype(np.float64), axis=1)
    )
    assert np.abs(whole - expected).max() < 1e-7  # measured: 2.3e-8, of the grid
    apart = np.concatenate([cosines(images, captions, rows[start : start + 7]) for start in range(0, 3000, 7)])
    assert np.array_equal(whole, apart)
    order = np.random.default_rng(2).permutation(3000)
    assert np.array_equal(cosines(images, captions, order), whole[order])
    # nor does the order in which a library adds; the twin in float32 depends on it
    assert np.array_equal(cosines(images[:, ::-1], captions[:, ::-1], rows), whole)
    products = images * captions
    assert not np.array_equal(products.sum(1), products[:, ::-1].sum(1))


def models(num: int, unread: tuple[int, ...] = ()) -> _pairs.Table:
    """Pairs whose cosines are multiples of 1/5, so that many are equal."""
    angle = np.arccos(np.arange(num) % 5 / 5)
    text = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return _pairs.Table(np.tile([1.0, 0.0], (num, 1)), text, unread)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(3, 30), keep=st.sampled_from([0.1, 0.29, 0.5, 0.9]))
def test_a_share_stays_whatever_the_order_and_the_shards(seed: int, size: int, keep: float) -> None:
    captions, order = [f"caption {n}" for n in range(23)], np.random.default_rng(seed).permutation(23).tolist()
    step = Score(run="r", keep=keep)
    first = _pairs.run(step, captions, models=models(23, unread=(3, 4)))
    assert len(first) == 21 - num_of_share(keep, 21) and not {3, 4} & set(first)
    assert _pairs.run(step, captions, models=models(23, unread=(3, 4)), order=order, max_samples=size) == first
    lowest_kept = min(n % 5 for n in range(23) if n not in first and n not in (3, 4))
    assert max(n % 5 for n in first) <= lowest_kept
    assert all(value == pytest.approx(n % 5 / 5, abs=1e-7) for n, (_, _, value) in first.items())


def test_a_least_score(tmp_path: Path) -> None:
    step, captions = Score(run="r", min_score=0.5), [f"caption {n}" for n in range(10)]
    found = _pairs.run(step, captions, models=models(10, unread=(0,)))
    assert {n: rule for n, (rule, _, _) in found.items()} == dict.fromkeys((1, 2, 5, 6, 7), "min_score")
    assert set(_pairs.run(step, captions, models=models(10), among=[1, 3])) == {1}
    manifest, tools = _pairs.write(tmp_path, captions), _pairs.work(tmp_path, models(10, unread=(0,)))
    facts = step.find(manifest, np.ones(10, bool), tools).facts
    assert facts["num_unread"] == 1 and sum(facts["scores"]["counts"]) == 9


def test_the_histogram_has_its_borders_where_it_says() -> None:
    counts = histogram(np.array([-1.0, -1 + 2 / NUM_BINS, 0.0, 0.999999, 1.0, 1.0 + 1e-9]))["counts"]
    assert [counts[0], counts[1], counts[NUM_BINS // 2], counts[-1]] == [1, 1, 1, 3] and len(counts) == NUM_BINS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "min_score or keep"),
        ({"min_score": 0.2, "keep": 0.5}, "min_score or keep"),
        ({"min_score": 2}, "min_score"),
        ({"min_score": "0.2"}, "min_score"),
        ({"keep": 1.0}, "keep"),
        ({"keep": 30}, "keep"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Score(run="r", **given).settings(_pairs.work(Path(), models(1)))
