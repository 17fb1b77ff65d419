from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.engine.schedule import Cosine, WarmupStableDecay
from vlm_train.errors import ConfigError


def test_cosine_by_hand() -> None:
    factor = Cosine(warmup_steps=4, total_steps=12, final=0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(8) == pytest.approx(0.55)
    assert factor(12) == pytest.approx(0.1)


def test_warmup_stable_decay_by_hand() -> None:
    factor = WarmupStableDecay(warmup_steps=2, decay_steps=4, total_steps=10)
    assert [factor(step) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


@given(total=st.integers(1, 500), share=st.floats(0, 1), final=st.floats(0, 1))
def test_factors_rise_then_never_rise_again(total: int, share: float, final: float) -> None:
    warmup = int(total * share)
    for schedule in (
        Cosine(warmup_steps=warmup, total_steps=total, final=final),
        WarmupStableDecay(warmup_steps=warmup, decay_steps=(total - warmup) // 2, total_steps=total, final=final),
    ):
        factors = [schedule(step) for step in range(total)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert factors[:warmup] == sorted(factors[:warmup])
        after = factors[warmup:]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warmup_that_does_not_fit_is_refused(warmup: int) -> None:
    with pytest.raises(ConfigError, match="warmup_steps"):
        Cosine(warmup_steps=warmup, total_steps=10)


def test_a_decay_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="decay_steps"):
        WarmupStableDecay(warmup_steps=5, decay_steps=6, total_steps=10)
