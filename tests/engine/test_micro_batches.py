"""Rows in micro-batches under budgets: each row once, no budget passed, as many on every rank, of even cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.micro_batches import Budgets, pack, pack_dialogues, take_rows
from vlm_train.errors import ConfigError
from vlm_train.types import Batch, DialogueSpec

SPEC = DialogueSpec(context_length=50, num_image_tokens=4, max_images=3)
DIALOGUES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=40)
BUDGETS = st.builds(
    Budgets,
    samples=st.none() | st.integers(1, 9),
    tokens=st.integers(50, 200),
    images=st.none() | st.integers(3, 12),
)


def batch_of(dialogues: list[tuple[int, int]]) -> Batch:
    lengths, images = torch.tensor(dialogues).reshape(-1, 2).unbind(1)
    weights = torch.ones(len(dialogues))
    keys = [str(row) for row in range(len(dialogues))]
    return Batch(dialogue_lengths=lengths, num_images=images, weights=weights, keys=keys)


def taken(batch: Batch, rows: list[int]) -> tuple[int, int, int]:
    chosen = take_rows(batch, rows)
    return len(rows), int(chosen["dialogue_lengths"].sum()), int(chosen["num_images"].sum())


@settings(deadline=None)
@given(DIALOGUES, BUDGETS)
def test_each_row_is_in_one_micro_batch_that_no_budget_forbids(dialogues, budgets):
    batch = batch_of(dialogues)
    groups = pack_dialogues(batch, budgets)
    assert sorted(row for rows in groups for row in rows) == list(range(len(dialogues)))
    limits = (budgets.samples, budgets.tokens, budgets.images)
    for rows in groups:
        assert rows and all(
            limit is None or size <= limit for size, limit in zip(taken(batch, rows), limits, strict=True)
        )


def are_few(num_groups: int, lengths: np.ndarray) -> bool:
    """Whether first fit decreasing may take as many groups of 60: no two of them fit into one, and against the best,
    which the order in which they come can only miss, it needs 11/9 and 6/9 more at most (Dosa 2007)."""
    in_order, load = 1, 0
    for length in lengths:
        in_order, load = (in_order, load + length) if load + length <= 60 else (in_order + 1, length)
    return num_groups < 2 * lengths.sum() / 60 + 1 and 9 * num_groups <= 11 * in_order + 6


@settings(deadline=None)
@given(DIALOGUES)
@example([(length, 0) for length in (24, 18, 18, 24, 18, 18)])  # two groups would do
@example([(31, 0)] * 40)
def test_there_are_few_and_they_are_even(dialogues):
    lengths = np.array([length for length, _ in dialogues])
    groups = pack(lengths[:, None] / 60)
    assert are_few(len(groups), lengths)
    loads = [lengths[rows].sum() for rows in groups]
    assert loads == sorted(loads, reverse=True)
    assert not are_few(12, np.full(12, 10))  # the twin: a group for each


def test_the_emptiest_is_filled_first():
    assert [sorted(rows) for rows in pack(np.array([[0.4], [0.4], [0.4], [0.4], [0.1], [0.1]]), 2)] == [
        [0, 2, 4],
        [1, 3, 5],
    ]
    full = np.array([[0.6], [0.4], [0.3], [0.3], [0.2], [0.2]])  # by evenness they would need three
    assert sorted(sorted(rows) for rows in pack(full)) == [[0, 1], [2, 3, 4, 5]] and len(pack(full, 3)) == 3


def num_groups(lengths_of_ranks: list[list[int]]) -> list[int]:
    batch = batch_of([(length, 0) for length in lengths_of_ranks[collectives.rank()]])
    return [len(rows) for rows in pack_dialogues(batch, Budgets(tokens=50))]


def test_every_rank_has_as_many():
    found = run_ranks(num_groups, 2, [[40, 40, 40], [10, 10]])
    assert found == [[1, 1, 1], [1, 1, 0]]


def test_no_rows_are_one_that_does_not_count():
    batch = batch_of([(7, 1), (9, 0)])
    company = take_rows(batch, [])
    assert company["dialogue_lengths"].tolist() == [7] and company["weights"].tolist() == [0]
    assert batch["weights"].tolist() == [1, 1]
    assert take_rows(batch, [1])["keys"] == ["1"] and take_rows(batch, range(1, 2))["keys"] == ["1"]


@pytest.mark.parametrize(("budgets", "named"), [(Budgets(tokens=49), "50"), (Budgets(images=2), "3")])
def test_the_longest_dialogue_must_fit(budgets, named):
    with pytest.raises(ConfigError, match=f"at least {named}"):
        budgets.check(SPEC)
    Budgets(tokens=50, images=3, samples=1).check(SPEC)
