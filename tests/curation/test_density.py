"""Density-based pruning: quotas against a slow reading of the quadratic program, complexity, exact shares, order."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import _pairs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import density, kmeans
from vlm_train.curation.density import Density
from vlm_train.curation.ranks import num_of_share
from vlm_train.errors import ConfigError

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


def wanted(complexity: np.ndarray, sizes: np.ndarray, num: int, temperature: float) -> np.ndarray:
    shares = np.where(sizes > 0, np.exp(complexity / temperature), 0)
    return num * shares / shares.sum()


def best(complexity: np.ndarray, sizes: np.ndarray, num: int, temperature: float) -> float:
    """The least squared distance from what is wanted of all whole numbers that are allowed."""
    aim = wanted(complexity, sizes, num, temperature)
    low = 1 if num >= np.count_nonzero(sizes) else 0
    choices = product(*(range(min(low, size), size + 1) for size in sizes.tolist()))
    return min(float(((np.array(kept) - aim) ** 2).sum()) for kept in choices if sum(kept) == num)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, share=st.floats(0, 1), seed=st.integers(0, 99), temperature=st.sampled_from([0.05, 0.3, 5.0]))
def test_quotas_are_nearest_to_what_complexity_asks_for(
    sizes: list[int], share: float, seed: int, temperature: float
) -> None:
    counts, complexity = np.array(sizes), np.random.default_rng(seed).random(len(sizes))
    num = round(share * sum(sizes))
    kept = density.quotas(complexity, counts, num, temperature)
    assert kept.sum() == num and (kept >= 0).all() and (kept <= counts).all()
    if num >= np.count_nonzero(counts):
        assert (kept[counts > 0] >= 1).all()
    distance = float(((kept - wanted(complexity, counts, num, temperature)) ** 2).sum())
    assert distance == pytest.approx(best(complexity, counts, num, temperature), abs=1e-6)


def test_cutting_and_scaling_what_is_wanted_is_not_the_nearest() -> None:
    """The twin: what lies beyond the sizes is shared out in proportion."""
    complexity, sizes, num = np.array([1.0, 0.4, 0.1]), np.array([4, 20, 20]), 20
    aim = wanted(complexity, sizes, num, 0.5)
    cut = np.minimum(aim, sizes)
    scaled = cut + (num - cut.sum()) * np.where(cut < sizes, aim, 0) / aim[cut < sizes].sum()
    kept = density.quotas(complexity, sizes, num, 0.5)
    assert ((scaled - aim) ** 2).sum() > ((kept - aim) ** 2).sum() + 0.5
    assert kept.tolist() == [4, 9, 7]


def clusters_of(centroids: np.ndarray, labels: np.ndarray, cosine: np.ndarray) -> kmeans.Clusters:
    return kmeans.Clusters(
        centroids_KD=centroids, nearest=labels[:, None].astype(np.int32), cosine=cosine, num_iterations=0
    )


def test_complexity_is_spread_times_distance_from_the_nearest_others() -> None:
    random = np.random.default_rng(0)
    centroids = random.normal(size=(25, 8))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    labels, cosine = random.integers(0, 24, 500), random.random(500)  # the last cluster is empty
    found = density.complexities(clusters_of(centroids, labels, cosine))
    for number in range(24):
        others = np.sort([1 - centroids[number] @ centroids[k] for k in range(24) if k != number])[:20]
        assert found[number] == pytest.approx((1 - cosine[labels == number]).mean() * np.mean(others), rel=1e-6)
    assert found[24] == 0
    order = random.permutation(500)
    assert np.array_equal(density.complexities(clusters_of(centroids, labels[order], cosine[order])), found)
    sums = [np.sum((1 - cosine)[each]) for each in (np.arange(500), order, np.arange(500)[::-1])]
    assert len(set(sums)) > 1  # the twin: sums as they come depend on the order


def blobs(num: int = 60) -> np.ndarray:
    """Three directions, the third one tight, the first wide."""
    random = np.random.default_rng(1)
    spread = np.repeat([0.8, 0.3, 0.02], num // 3)[:, None]
    found = np.repeat(np.eye(6)[:3], num // 3, axis=0) + spread * random.normal(size=(num, 6))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(9, 60), keep=st.sampled_from([0.05, 0.29, 0.5, 0.95]))
def test_exactly_a_share_stays_whatever_the_order(seed: int, size: int, keep: float) -> None:
    captions, order = [f"caption {n}" for n in range(60)], np.random.default_rng(seed).permutation(60).tolist()
    step, models = Density(run="r", keep=keep, num_clusters=3), _pairs.Table(blobs(), unread=(7, 50))
    found = _pairs.run(step, captions, models=models)
    assert len(found) == 58 - num_of_share(keep, 58) and not {7, 50} & set(found)
    assert _pairs.run(step, captions, models=models, order=order, max_samples=size) == found


def test_the_tight_cluster_is_thinned_most_and_its_middle_goes_first(tmp_path: Path) -> None:
    manifest = _pairs.write(tmp_path, [f"caption {n}" for n in range(60)])
    features, among = blobs(), np.ones(60, bool)
    step = Density(run="r", keep=0.5, num_clusters=3)
    found = step.find(manifest, among, _pairs.work(tmp_path, _pairs.Table(features)))
    clusters = kmeans.spherical(features.astype(np.float32), manifest.uids(), num_clusters=3)
    label, distance = clusters.nearest[:, 0], 1 - clusters.cosine
    assert np.array_equal(found.values, distance[found.rows])
    tight = label == label[59]
    share = [np.isin(np.flatnonzero(mask), found.rows).mean() for mask in (tight, ~tight)]
    assert share[0] > share[1]
    for number in range(3):
        dropped = np.intersect1d(np.flatnonzero(label == number), found.rows)
        kept = np.setdiff1d(np.flatnonzero(label == number), found.rows)
        if len(dropped) and len(kept):
            assert distance[dropped].max() <= distance[kept].min()
    assert found.facts["num_clusters"] == 3 and found.facts["num_unread"] == 0


def test_nothing_among_and_one_cluster(tmp_path: Path) -> None:
    manifest, tools = _pairs.write(tmp_path, [f"caption {n}" for n in range(6)]), _pairs.work(tmp_path)
    tools = _pairs.work(tmp_path, _pairs.Table(blobs(6), unread=(0,)))
    nothing = Density(run="r", keep=0.5).find(manifest, np.arange(6) == 0, tools)
    assert not len(nothing.rows) and nothing.facts == {"num_unread": 1}
    assert len(Density(run="r", keep=0.6).find(manifest, np.ones(6, bool), tools).rows) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": 0}, "keep"),
        ({"keep": 1.0}, "keep"),
        ({"keep": 0.5, "num_clusters": 0}, "num_clusters"),
        ({"keep": 0.5, "temperature": 0}, "temperature"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Density(run="r", **given).settings(_pairs.work(Path(), _pairs.Table(blobs())))
