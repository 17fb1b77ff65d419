"""The gradient of a step does not depend on how many ranks or micro-batches computed it.

Measured in fp64 over W in {1, 2} and K in {1, 2, 3}, unequal shares included: largest relative error 3e-16 to 2e-14.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.micro_batches import Budgets, take_rows
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.objectives.base import SeparableObjective
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.sigmoid import Sigmoid
from vlm_train.types import Batch, BatchRows, LossOutput, rank_share

TOLERANCE = 1e-12
GLOBAL_BATCH = 13


class TinyModel(nn.Module):
    """Two linear towers; dropout in one of them."""

    outputs = frozenset({"image_features", "text_features"})

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.vision, self.text, self.dropout = nn.Linear(6, 4), nn.Linear(5, 4), nn.Dropout(dropout)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image = self.vision(self.dropout(batch["images"]))
        text = self.text(batch["text_ids"])
        return {
            "image_features": nn.functional.normalize(image, dim=-1),
            "text_features": nn.functional.normalize(text, dim=-1),
        }


class Regression(SeparableObjective):
    """A separable objective with a count that differs between micro-batches."""

    requires = frozenset({"image_features"})

    def count(self, batch: Batch) -> Tensor:
        return (batch["labels"] >= 0).sum()

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        counted = batch["labels"] >= 0
        errors = (model(batch)["image_features"].sum(1) - batch["labels"]).square()[counted]
        return LossOutput(sum=errors.sum(), count=counted.sum())


OBJECTIVES = {"infonce": InfoNCE, "sigmoid": Sigmoid, "regression": Regression}


def make_batch(start: int, stop: int) -> Batch:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(GLOBAL_BATCH, 6, generator=generator, dtype=torch.float64)
    texts = torch.randn(GLOBAL_BATCH, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(GLOBAL_BATCH) % 5 - 1
    rows = slice(start, stop)
    whole_step = Batch(step=3, errors=[], place={"epoch": 1, "epoch_start": 8})
    return Batch(
        images=images[rows], text_ids=texts[rows], labels=labels[rows], weights=torch.ones(stop - start), **whole_step
    )


def gradients(objective_name: str, plan: StepPlan, dropout: float = 0.0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, objective = TinyModel(dropout).double(), OBJECTIVES[objective_name]().double()
    parameters = dict(nn.ModuleDict({"model": model, "objective": objective}).named_parameters())
    step = GradientStep(model=model, objective=objective, plan=plan)
    batch = make_batch(*rank_share(GLOBAL_BATCH, plan.rank, plan.world_size))
    loss, _ = step.run(batch, 3, lambda scalar, is_last: scalar.backward())
    found = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    if plan.world_size > 1:  # what DistributedDataParallel does
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= plan.world_size
    return {**found, "loss": loss.detach()}


def plan_for(rank: int, world_size: int, micro_batch: int | None) -> StepPlan:
    return StepPlan(
        global_batch=GLOBAL_BATCH, budgets=Budgets(samples=micro_batch), rank=rank, world_size=world_size, seed=5
    )


def largest_error(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).norm() / right[k].norm().clamp(min=1e-12)) for k in right)


def on_two_ranks(micro_batches: list[int | None], dropout: float) -> dict[str, dict[str, Tensor]]:
    return {
        f"{name}/{micro_batch}": gradients(name, plan_for(dist.get_rank(), 2, micro_batch), dropout)
        for name in OBJECTIVES
        for micro_batch in micro_batches
    }


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("micro_batch", [1, 5, 7, 12])
def test_micro_batches_do_not_change_the_gradient(name: str, micro_batch: int) -> None:
    whole = gradients(name, plan_for(0, 1, None))
    assert largest_error(gradients(name, plan_for(0, 1, micro_batch)), whole) < TOLERANCE


def test_ranks_and_micro_batches_do_not_change_the_gradient() -> None:
    for result in run_ranks(on_two_ranks, 2, [None, 3, 6], 0.0):
        for key, found in result.items():
            assert largest_error(found, gradients(key.split("/")[0], plan_for(0, 1, None))) < TOLERANCE, key


def test_two_ranks_draw_the_noise_of_two_micro_batches() -> None:
    """13 samples are cut after the seventh either way, so dropout falls on the same values."""
    for result in run_ranks(on_two_ranks, 2, [None], 0.5):
        for name in ("infonce", "sigmoid"):
            one_rank = gradients(name, plan_for(0, 1, 7), dropout=0.5)
            assert largest_error(result[f"{name}/None"], one_rank) < TOLERANCE


def test_without_replayed_randomness_the_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradients("infonce", plan_for(0, 1, 7), dropout=0.5)
    seeds = iter(range(100))
    monkeypatch.setattr(StepPlan, "seed_for", lambda self, step, start: next(seeds))
    assert largest_error(gradients("infonce", plan_for(0, 1, 7), dropout=0.5), right) > 1e-2


def test_a_mean_of_means_is_wrong() -> None:
    """The usual accumulation: each micro-batch divides by its own count."""
    torch.manual_seed(0)
    model, objective = TinyModel(0.0).double(), Regression()
    for rows in plan_for(0, 1, 5).cut(make_batch(0, GLOBAL_BATCH)):
        output = objective(model, take_rows(make_batch(0, GLOBAL_BATCH), rows))
        (output.sum / output.count / 3).backward()
    right = gradients("regression", plan_for(0, 1, None))
    assert float((model.vision.weight.grad - right["model.vision.weight"]).norm()) > 1e-3


def test_a_micro_batch_has_the_rows_of_every_field_that_has_rows_and_nothing_else() -> None:
    """Whatever fields a batch gets: `types` says which have a row a sample."""
    rows = {name: list(range(GLOBAL_BATCH)) for name in BatchRows.__annotations__}
    others = {name: object() for name in Batch.__annotations__.keys() - rows.keys()}
    assert others.keys() >= {"step", "errors", "place"}
    sliced = take_rows({**rows, **others}, range(2, 5))  # type: ignore[typeddict-item]
    assert sliced == {name: [2, 3, 4] for name in rows}
    assert take_rows(make_batch(0, GLOBAL_BATCH), range(2, 5)).keys() == {"images", "text_ids", "labels", "weights"}


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 5), (2, 3), (3, None), (4, 2)])
def test_slices_cover_every_row_once(world_size: int, micro_batch: int | None) -> None:
    counts = set()
    for rank in range(world_size):
        plan = plan_for(rank, world_size, micro_batch)
        start, stop = rank_share(GLOBAL_BATCH, rank, world_size)
        cut = plan.cut(make_batch(start, stop))
        assert [row for rows in cut for row in rows] == list(range(stop - start))
        counts.add(len(cut))
    assert len(counts) == 1
