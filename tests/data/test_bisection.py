from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data import bisection
from vlm_train.data.bisection import cosines, order_alike


def unit(features):
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)


def clusters(num=3000, width=16, seed=0):
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((num // 30, width))
    return unit(centres[draw.integers(0, len(centres), num)] + 0.3 * draw.standard_normal((num, width)))


@settings(max_examples=60, deadline=None)
@given(num=st.integers(0, 200), width=st.integers(1, 5), seed=st.integers(0, 99), kinds=st.integers(1, 200))
def test_every_row_once_and_features_go_along(num, width, seed, kinds):
    draw = np.random.default_rng(seed)
    before = unit(draw.standard_normal((kinds, width)))[draw.integers(0, kinds, num)]  # few kinds: many are equal
    after, again = before.copy(), before.copy()
    with patch.object(bisection, "_LEAF", 8):
        rows = order_alike(after)
        assert np.array_equal(order_alike(again), rows)
    assert np.array_equal(np.sort(rows), np.arange(num)) and np.array_equal(before[rows], after)


def test_neighbours_are_alike():
    features = clusters()
    scores = features @ features.T
    np.fill_diagonal(scores, -1)
    nearest = scores.max(axis=1).mean()  # 0.957; no order has more
    shuffled, any_two = cosines(features)
    with patch.object(bisection, "_LEAF", 64):  # six levels of halves
        order_alike(features)
    found, same = cosines(features)
    assert found > 0.9 * nearest  # measured 0.886, a share of 0.925
    assert shuffled < 0.1 and same == pytest.approx(any_two, abs=1e-6)  # the twin: file order


def on_an_arc(turned):
    """How many steps of the order lead back, of points on half a circle; `turned`: whether halves know where it is."""
    angles = np.random.default_rng(0).permutation(np.linspace(0, np.pi, 400))
    features = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    along = bisection._along_direction
    with patch.object(bisection, "_LEAF", 16):
        if turned:
            rows = order_alike(features)
        else:
            with patch.object(bisection, "_along_direction", lambda cell, before: along(cell, 0 * before)):
                rows = order_alike(features)
    steps = np.diff(angles[rows])
    return min((steps < 0).sum(), (steps > 0).sum())


def test_the_nearer_half_comes_first():
    assert on_an_arc(turned=True) == 0
    assert on_an_arc(turned=False) > 0


def test_features_that_are_all_equal_keep_their_order():
    features = unit(np.ones((3000, 4)))
    assert np.array_equal(np.sort(order_alike(features)), np.arange(3000))
    assert cosines(features) == pytest.approx((1, 1), abs=1e-6)
