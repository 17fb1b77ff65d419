"""Norms of weights and gradients: the formula, by part and in all, whole and sharded."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.engine.norms import Learning, part_of


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), nn.Linear(4, 3)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return (self.vision(image) * self.text(text)).sum()


class Learner(nn.Module):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = Pair().double()
        self.objective = nn.ParameterDict({"logit_scale": nn.Parameter(torch.tensor(2.0, dtype=torch.float64))})

    def backward(self) -> None:
        torch.manual_seed(3)
        image, text = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
        (self.model(image, text) * self.objective["logit_scale"]).backward()


def groups_of(learner: Learner) -> list[dict[str, object]]:
    return torch.optim.AdamW([{"params": list(learner.named_parameters())}], lr=1e-3).param_groups


def numbers(learner: Learner) -> dict[str, float]:
    learning = Learning(groups_of(learner))
    total, by_part = learning.of_gradients()
    found = {"grad_norm": total, **by_part, **learning.of_parameters()}
    return {name: float(value) for name, value in found.items()}


def by_hand(learner: Learner) -> dict[str, float]:
    """Sums of squares, number by number."""
    squares: dict[str, float] = {}
    for name, parameter in learner.named_parameters():
        for kind, tensor in (("param_norm", parameter), ("grad_norm", parameter.grad)):
            value = math.fsum(x * x for x in tensor.flatten().tolist())
            for key in (kind, f"{kind}/{part_of(name)}"):
                squares[key] = squares.get(key, 0.0) + value
    return {key: math.sqrt(value) for key, value in squares.items()}


def test_norms_are_those_of_the_formula() -> None:
    """fp64; measured: 4e-16 apart."""
    learner, other = Learner(), Learner(seed=2)
    for each in (learner, other):
        each.backward()
    found = numbers(learner)
    assert set(found) == {f"{kind}{part}" for kind in ("grad_norm", "param_norm")
                          for part in ("", "/vision", "/text", "/objective")}  # fmt: skip
    assert found == pytest.approx(by_hand(learner), rel=1e-14)
    assert found != pytest.approx(by_hand(other), rel=1e-14)  # the twin


def test_the_norm_of_all_is_what_torch_clips_by() -> None:
    learner = Learner()
    learner.backward()
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in learner.parameters()])
    assert numbers(learner)["grad_norm"] == float(expected)


def test_a_part_without_a_gradient_counts_nothing_and_an_infinite_one_stays_alone() -> None:
    learner = Learner()
    learner.backward()
    for parameter in learner.model.text.parameters():
        parameter.grad = None
    assert numbers(learner)["grad_norm/text"] == 0.0
    learner.model.vision[0].weight.grad[0, 0] = math.inf
    found = numbers(learner)
    assert (found["grad_norm"], found["grad_norm/vision"]) == (math.inf, math.inf)
    assert math.isfinite(found["grad_norm/objective"])


def on_a_rank() -> dict[str, dict[str, float]]:
    learner = Learner()
    sharding.shard(learner.model, init_device_mesh("cpu", (collectives.world_size(),)))
    learner.backward()  # the same on each rank, so the mean is that of one
    with mock.patch.object(sharding.collectives, "all_reduce_sum", lambda x: x):
        own = numbers(learner)  # the twin: of this rank's slices alone
    return {"all": numbers(learner), "own": own}


def test_sharded_norms_are_those_of_the_whole() -> None:
    """fp64; measured: 3e-16 apart. What is whole on each rank is counted once."""
    learner = Learner()
    learner.backward()
    for found in run_ranks(on_a_rank, 2):
        assert found["all"] == pytest.approx(numbers(learner), rel=1e-14)
        assert found["own"] != pytest.approx(numbers(learner), rel=1e-14)
