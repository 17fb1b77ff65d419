"""The exchanges on real processes: unequal rows, exact gradients, errors instead of hangs."""

from __future__ import annotations

import time

import pytest
import torch

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import RankFailure, run_ranks
from vlm_train.errors import VlmError

COUNTS = [3, 0, 2]


def rows(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(COUNTS[rank], 4, dtype=torch.float64, generator=generator)


def weights(owner: int) -> torch.Tensor:
    """What `owner`'s loss asks of each gathered row."""
    generator = torch.Generator().manual_seed(100 + owner)
    return torch.randn(sum(COUNTS), 4, dtype=torch.float64, generator=generator)


def exchange() -> dict[str, object]:
    rank = collectives.rank()
    x = rows(rank).requires_grad_()
    gathered = collectives.gather_rows(x)
    (gathered * weights(rank)).sum().backward()
    wrong = x.detach().clone().requires_grad_()
    local_only = torch.cat([rows(other) if other != rank else wrong for other in range(len(COUNTS))])
    (local_only * weights(rank)).sum().backward()
    uneven = torch.full((rank,), rank, dtype=torch.int64)
    mismatched = None
    try:
        collectives.gather_rows(torch.zeros(2, 3 + rank))
    except VlmError as error:
        mismatched = str(error)
    return {
        "gathered": gathered.detach(),
        "grad": x.grad,
        "wrong_grad": wrong.grad,
        "bool": collectives.gather_rows_detached(torch.ones(rank + 1, dtype=torch.bool)),
        "all_empty": collectives.gather_rows(torch.zeros(0, 4)),
        "uneven": collectives.gather_rows_detached(uneven),
        "counts": collectives.row_counts(uneven),
        "sum": collectives.all_reduce_sum(torch.tensor(rank + 1)),
        "max": collectives.all_reduce_max(torch.tensor(float(rank))),
        "objects": collectives.gather_objects({"rank": rank, "text": "é" * rank}),
        "numbers": collectives.gather_objects(rank + 10),
        "mismatched": mismatched,
        "me": [rank, collectives.world_size()],
    }


@pytest.fixture(scope="module")
def exchanged() -> list[dict]:
    return run_ranks(exchange, len(COUNTS))


def test_gather_is_in_rank_order_with_unequal_counts(exchanged: list[dict]) -> None:
    expected = torch.cat([rows(rank) for rank in range(len(COUNTS))])
    for rank, result in enumerate(exchanged):
        assert result["me"] == [rank, len(COUNTS)]
        assert torch.equal(result["gathered"], expected)
        assert result["uneven"].tolist() == [1, 2, 2]
        assert result["counts"] == [0, 1, 2]
        assert result["bool"].tolist() == [True] * 6
        assert result["all_empty"].shape == (0, 4)


def test_gradient_is_what_all_ranks_ask_of_a_row(exchanged: list[dict]) -> None:
    asked = sum(weights(owner) for owner in range(len(COUNTS))).split(COUNTS)
    for result, expected in zip(exchanged, asked, strict=True):
        torch.testing.assert_close(result["grad"], expected, rtol=1e-14, atol=1e-15)  # fp64 sums of 3 terms
    # the twin, which keeps only what a rank asks of its own rows, is wrong
    assert not torch.allclose(exchanged[0]["wrong_grad"], asked[0])


def test_reductions_and_objects(exchanged: list[dict]) -> None:
    for result in exchanged:
        assert result["sum"].item() == 6
        assert result["max"].item() == 2.0
        assert result["objects"] == [{"rank": rank, "text": "é" * rank} for rank in range(3)]
        assert result["numbers"] == [10, 11, 12]


def test_a_mismatch_of_rows_is_an_error_on_every_rank(exchanged: list[dict]) -> None:
    for result in exchanged:
        assert "[3, 4, 5]" in result["mismatched"]


def test_everything_is_the_identity_on_one_process() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.gather_rows(x) is x
    assert collectives.row_counts(x) == [3]
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.gather_objects({"a": [1]}) == [{"a": [1]}]
    assert not collectives.gather_rows_detached(x).requires_grad
    total = collectives.all_reduce_sum(x)
    assert torch.equal(total, x) and total.data_ptr() != x.data_ptr() and not total.requires_grad
    collectives.barrier()


def fail_on_last_rank() -> None:
    if collectives.rank() == 1:
        raise ValueError("the second rank is unwell")
    collectives.all_reduce_sum(torch.ones(1))  # would wait for the rank that left


def test_a_failing_rank_is_reported_with_its_traceback_and_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="the second rank is unwell"):
        run_ranks(fail_on_last_rank, 2, timeout=100.0)
    assert time.monotonic() - start < 50


def never_return() -> None:
    time.sleep(100)


def test_a_rank_that_hangs_is_ended() -> None:
    with pytest.raises(RankFailure, match="did not finish"):
        run_ranks(never_return, 1, timeout=0.5)
