"""Exact ranks, ties, intervals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.errors import VlmError
from vlm_train.evaluation.metrics import (
    Standing,
    credit_at_k,
    knowing_nothing,
    macro_mean,
    on_grid,
    standings,
    wilson_interval,
)


def unit_rows(num_rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@settings(max_examples=60, deadline=None)
@given(
    above=st.integers(0, 3),
    tied=st.integers(0, 3),
    right=st.integers(0, 3),
    below=st.integers(0, 2),
    k=st.integers(1, 6),
)
def test_credit_is_the_average_over_all_orders_of_equal_scores(
    above: int, tied: int, right: int, below: int, k: int
) -> None:
    tie = [False] * tied + [True] * right
    orders = list(itertools.permutations(tie))
    hits = sum(any(([False] * above + list(order) + [False] * below)[:k]) for order in orders)
    standing = Standing(*(torch.tensor([value]) for value in (above, tied, right)))
    assert credit_at_k(standing, k).item() == pytest.approx(hits / len(orders), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    num_queries=st.integers(1, 5),
    num_candidates=st.integers(1, 7),
    k=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_standings_match_brute_force(
    data: st.DataObject, num_queries: int, num_candidates: int, k: int, seed: int
) -> None:
    # few distinct vectors, so that ties are common
    queries = unit_rows(3, 4, seed)[
        torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=num_queries, max_size=num_queries)))
    ]
    candidates = unit_rows(3, 4, seed + 1)[
        torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=num_candidates, max_size=num_candidates)))
    ]
    items = torch.arange(num_queries)
    owners = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=num_candidates, max_size=num_candidates)))
    got = credit_at_k(standings(on_grid(queries, "q"), on_grid(candidates, "c"), items, owners), k)
    for query in range(num_queries):
        # fsum of rounded-to-grid products: no order of summation to agree on
        scores = [
            math.fsum((on_grid(queries, "q")[query] * on_grid(candidates, "c")[index]).tolist())
            for index in range(num_candidates)
        ]
        right = [score for index, score in enumerate(scores) if owners[index] == query]
        wrong = [score for index, score in enumerate(scores) if owners[index] != query]
        if not right:
            assert got[query] == 0
            continue
        best = max(right)
        num_above, num_tied = sum(score > best for score in wrong), sum(score == best for score in wrong)
        places, num_right = max(0, k - num_above), right.count(best)
        missed = math.comb(num_tied, places) / math.comb(num_tied + num_right, min(places, num_tied + num_right))
        assert got[query].item() == pytest.approx(1 - missed, abs=1e-12)


def test_scores_are_exact_whatever_the_tile_or_the_order_of_summation() -> None:
    left, right = unit_rows(257, 512, 1), unit_rows(129, 512, 2)
    exact = on_grid(left, "left") @ on_grid(right, "right").T
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact, on_grid(left, "left")[:, order] @ on_grid(right, "right")[:, order].T)
    assert torch.equal(exact[100:103], on_grid(left, "left")[100:103] @ on_grid(right, "right").T)
    assert exact[5, 7].item() == math.fsum((on_grid(left, "left")[5] * on_grid(right, "right")[7]).tolist())
    # the twin: the same in fp64 without the grid depends on the order
    assert not torch.equal(left.double() @ right.double().T, left.double()[:, order] @ right.double()[:, order].T)
    # the grid moves a cosine by less than fp32 rounds it (2^-24); measured 3.1e-8
    assert (exact - left.double() @ right.double().T).abs().max() < 2**-24


def test_a_constant_scorer_is_at_chance_wherever_the_answer_stands() -> None:
    same = on_grid(F.normalize(torch.ones(20, 8), dim=1), "same")
    items = torch.arange(20)
    for owners in (items, items.flip(0)):
        standing = standings(same, same, items, owners)
        for k in (1, 5, 10):
            assert torch.allclose(credit_at_k(standing, k), torch.tensor(k / 20, dtype=torch.float64))
    # the twins: `first maximum` and `nothing above` rate the same scorer 0.05 by luck of place, or 1
    assert (standing.num_above == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.5])
def test_rows_that_cannot_be_ranked_are_refused(bad: float) -> None:
    rows = unit_rows(6, 4, 0)
    rows[3] *= bad
    with pytest.raises(VlmError, match=r"1 of 6 rows, first is row 3"):
        on_grid(rows, "Image features")
    scores = torch.tensor([math.nan, 0.1, 0.2])
    assert (scores > scores[0]).sum() == 0  # the twin: counted, a NaN ranks first


def test_chance_with_several_right_answers() -> None:
    chance = credit_at_k(knowing_nothing(torch.tensor([1, 5]), 100), 10)
    assert chance[0].item() == pytest.approx(0.1)
    assert chance[1].item() == pytest.approx(1 - math.comb(95, 10) / math.comb(100, 10))


def test_wilson_interval_as_published() -> None:
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for successes, num_trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, num_trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_macro_mean_weighs_classes_not_images() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 0.0])
    labels = torch.tensor([2, 2, 2, 5])
    assert macro_mean(values, labels) == 0.5
    assert values.mean().item() == 0.75  # the twin
