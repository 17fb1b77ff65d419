"""The proof that contrastive gradients do not depend on ranks and micro-batches; real DDP; open_clip on two ranks."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_parity import assert_parity, features, ours
from torch.nn.parallel import DistributedDataParallel

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.sigmoid import Sigmoid

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "proof"))
import gradients

SHARES = [7, 4]


def test_the_proof_holds(tmp_path: Path) -> None:
    target = tmp_path / "gradients.json"
    assert gradients.main(["--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert len(rows) == 312
    assert {row["bar"] for row in rows} == {1e-10}
    for row in rows:
        assert row["value"] < 1e-13, row  # measured 1.6e-15 at most, over all worlds
        assert row["control"] > 0.04, row  # measured 0.045 at least: no error hides


class Step(torch.nn.Module):
    """Model and objective under one data-parallel wrapper, as the engine holds them."""

    def __init__(self, name: str, implementation: str) -> None:
        super().__init__()
        self.model = gradients.Towers()
        self.objective = gradients.OBJECTIVES[name](implementation=implementation).double()

    def forward(self, batch):
        output = self.objective.loss(self.objective.features(self.model, batch))
        return output.sum, output.count


def data_parallel_gradients(name: str, implementation: str) -> dict[str, torch.Tensor]:
    step = Step(name, implementation)
    parallel = DistributedDataParallel(step)  # named: its reducer must outlive the backward
    total, count = parallel(gradients.rank_batch(name, SHARES))
    (total * collectives.world_size() / collectives.all_reduce_sum(count)).backward()
    return gradients.gradients_of(step.model, step.objective)


def open_clip_default_ratio() -> float:
    """The towers' gradient under open_clip's default settings, relative to ours."""
    from open_clip.loss import ClipLoss

    rows = features(5, seed=collectives.rank())
    leaf = rows["image_features"].clone().requires_grad_()
    default = ClipLoss(rank=collectives.rank(), world_size=collectives.world_size())
    default(leaf, rows["text_features"], InfoNCE().logit_scale.exp().detach()).backward()
    exact = ours(InfoNCE(), rows, 10)["image_features"]
    return float((leaf.grad * exact).sum() / exact.square().sum())


def two_ranks() -> dict[str, Any]:
    for kind, implementation in product((InfoNCE, Sigmoid), gradients.IMPLEMENTATIONS):
        assert_parity(kind(implementation=implementation), features(5, seed=collectives.rank()), 10)
    cases = product(gradients.OBJECTIVES, gradients.IMPLEMENTATIONS)
    return {
        "ratio": open_clip_default_ratio(),
        "gradients": {"/".join(case): data_parallel_gradients(*case) for case in cases},
    }


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Any]]:
    """Parity with open_clip is asserted on the ranks themselves."""
    return run_ranks(two_ranks, 2)


@pytest.mark.parametrize("implementation", gradients.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", list(gradients.OBJECTIVES))
def test_data_parallel_gradients_equal_one_process(
    on_two_ranks: list[dict[str, Any]], name: str, implementation: str
) -> None:
    expected = gradients.reference(name, sum(SHARES))
    expected.pop("loss")
    for result in on_two_ranks:
        got = result["gradients"][f"{name}/{implementation}"]
        assert gradients.largest_error(got, expected) < 1e-13  # measured 1.3e-15
        halved = {key: value / 2 for key, value in got.items()}  # the twin: the factor W forgotten
        assert gradients.largest_error(halved, expected) == pytest.approx(0.5)


def test_open_clip_by_default_gives_the_towers_half_of_the_gradient(on_two_ranks: list[dict[str, Any]]) -> None:
    # the documented deviation (local_loss and gather_with_grad off): 1/W, with an equal loss
    assert [result["ratio"] for result in on_two_ranks] == pytest.approx([0.5, 0.5], rel=1e-4)
