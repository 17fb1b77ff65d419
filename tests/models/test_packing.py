"""Packed rows: nothing is lost or doubled, little room is left over, and what is laid in comes out where it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.models.packing import Packed, pack_rows

LENGTHS = st.lists(st.integers(1, 24), max_size=24)
CPU = torch.device("cpu")


def totals(lengths: list[int], rows: list[list[int]]) -> list[int]:
    return [sum(lengths[index] for index in row) for row in rows]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20))
def test_every_dialogue_is_in_one_row_and_no_row_is_over_its_limit(lengths: list[int], limit: int) -> None:
    rows = pack_rows(lengths, limit)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(total <= limit or len(row) == 1 for total, row in zip(totals(lengths, rows), rows, strict=True))
    assert rows == pack_rows(lengths, limit)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20))
def test_no_two_rows_fit_into_one(lengths: list[int], limit: int) -> None:
    """So all rows but one are more than half full on average, and there are fewer than twice as many as needed."""
    found = totals(lengths, pack_rows(lengths, limit))
    assert all(one + other > limit for one, other in itertools.combinations(found, 2))
    if max(lengths, default=0) <= limit:
        assert len(found) <= max(1, -(-2 * sum(lengths) // limit))


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=7), st.integers(12, 20))
def test_rows_are_at_most_11_ninths_of_the_fewest_and_one(lengths: list[int], limit: int) -> None:
    """The bound of best fit decreasing (Johnson et al. 1974: 11/9 OPT + 4), by trying all ways; here 1 is enough."""

    def fewest(rest: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not rest:
            return len(rooms)
        first, later = rest[0], rest[1:]
        options = [fewest(later, (*rooms, limit - first))]
        for place, room in enumerate(rooms):
            if room >= first:
                options.append(fewest(later, (*rooms[:place], room - first, *rooms[place + 1 :])))
        return min(options)

    assert len(pack_rows(lengths, limit)) <= 11 / 9 * fewest(tuple(lengths), ()) + 1


@settings(deadline=None)
@given(LENGTHS.flatmap(lambda lengths: st.tuples(st.just(lengths), st.permutations(lengths))), st.integers(1, 20))
def test_the_order_of_the_dialogues_changes_no_row_but_in_its_names(
    pair: tuple[list[int], list[int]], limit: int
) -> None:
    contents = [[[lengths[index] for index in row] for row in pack_rows(lengths, limit)] for lengths in pair]
    assert contents[0] == contents[1]


def test_the_rows_of_an_example() -> None:
    assert pack_rows([3, 8, 5, 5, 2, 30], 10) == [[5], [1, 4], [2, 3], [0]]
    assert pack_rows([], 10) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 16))
def test_what_is_packed_comes_out_where_it_was(lengths: list[int], limit: int) -> None:
    num_tokens = max(lengths) + 2
    x_BTD = torch.randn(len(lengths), num_tokens, 3, dtype=torch.float64, requires_grad=True)
    real_BT = torch.arange(num_tokens) < torch.tensor(lengths)[:, None]
    packed = Packed(lengths, rows := pack_rows(lengths, limit), device=CPU)
    rows_RLD = packed.pack(x_BTD)
    assert rows_RLD.shape == (len(rows), max(totals(lengths, rows)), 3)
    back_BTD = packed.unpack(rows_RLD, num_tokens=num_tokens)
    assert torch.equal(back_BTD, x_BTD * real_BT[:, :, None])
    weights = torch.randn_like(back_BTD)
    (back_BTD * weights).sum().backward()
    assert torch.equal(x_BTD.grad, weights * real_BT[:, :, None])  # type: ignore[arg-type]


def test_positions_and_mask_are_those_of_each_dialogue_alone() -> None:
    packed = Packed([2, 3, 1], [[1, 0], [2]], device=CPU)
    assert packed.positions_RL.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    first, second = packed.mask[:, 0].int().tolist()
    assert first == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert second == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert packed.mask.dtype == torch.bool and packed.mask.shape == (2, 1, 5, 5)


@pytest.mark.parametrize("rows", [[[0, 1, 2]], [[2], [0, 1]]])
def test_no_softmax_is_over_nothing(rows: list[list[int]]) -> None:
    assert Packed([4, 1, 3], rows, device=CPU).mask.any(dim=-1).all()
