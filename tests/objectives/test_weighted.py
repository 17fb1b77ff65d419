"""Weighted sums of objectives and distillation: their values, and one gradient for any ranks and micro-batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.errors import ConfigError
from vlm_train.objectives.base import Objective, SeparableObjective
from vlm_train.objectives.distill import Distill
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.weighted import WeightedSum
from vlm_train.types import Batch, LossOutput, Model, rank_share

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "proof"))
import gradients

NUM_PAIRS = 11
WEIGHTS = {"contrast": 0.7, "energy": 2.0, "distill": 1.3}


class Energy(SeparableObjective):
    """A separable objective whose terms are as many as a sample's tokens, so that a mean of means is no mean."""

    requires = frozenset({"image_features"})

    def count(self, batch: Batch) -> Tensor:
        return tokens(batch).sum()

    def forward(self, model: Model, batch: Batch) -> LossOutput:
        terms = model(batch)["image_features"][:, :3].exp().sum(1) * tokens(batch)
        count = self.count(batch)
        return LossOutput(sum=terms.sum(), count=count, metrics={"energy": (terms.sum().detach(), count)})


def tokens(batch: Batch) -> Tensor:
    return batch["labels"] * (batch["weights"] != 0)


class Teacher(gradients.Towers):
    """Other weights than the student's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.7, generator=generator)


def make() -> WeightedSum:
    distill = Distill(teacher="-", teacher_scale=9.0)
    distill.bind(Teacher())
    return WeightedSum(parts={"contrast": InfoNCE(), "energy": Energy(), "distill": distill}, weights=WEIGHTS).double()


def global_batch() -> Batch:
    batch = gradients.global_batch("infonce", NUM_PAIRS)
    batch["labels"] = 1 + torch.arange(NUM_PAIRS) % 5
    return batch


def by_formula() -> dict[str, Tensor]:
    """Loss and gradients of one process from the formulas alone."""
    batch, model, objective = global_batch(), gradients.Towers(), make()
    student, taught = model(batch), Teacher()(batch)
    contrast, distill = objective.parts["contrast"], objective.parts["distill"]
    logits = contrast.logit_scale.exp() * student["image_features"] @ student["text_features"].T
    right = torch.arange(NUM_PAIRS)
    loss = WEIGHTS["contrast"] * (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    own = distill.logit_scale.exp() * student["image_features"] @ student["text_features"].T
    theirs = (9.0 * taught["image_features"] @ taught["text_features"].T).detach()
    soft = (F.cross_entropy(own, theirs.softmax(1)) + F.cross_entropy(own.T, theirs.T.softmax(1))) / 2
    energy = (student["image_features"][:, :3].exp().sum(1) * tokens(batch)).sum() / tokens(batch).sum()
    loss = loss + WEIGHTS["distill"] * soft + WEIGHTS["energy"] * energy
    loss.backward()
    return {"loss": loss.detach(), **gradients.gradients_of(model, objective)}


def one_step(num_micro_batches: int, wrong: bool = False) -> dict[str, Tensor]:
    """The engine's step in this world. `wrong`: each micro-batch and rank takes a mean of its own."""
    rank, world_size = collectives.rank(), collectives.world_size()
    start, stop = rank_share(NUM_PAIRS, rank, world_size)
    batch = Batch(**{key: value[start:stop] for key, value in global_batch().items()})
    largest = -(-NUM_PAIRS // world_size)
    plan = StepPlan(
        global_batch=NUM_PAIRS,
        budgets=Budgets(samples=-(-largest // num_micro_batches)),
        rank=rank,
        world_size=world_size,
        seed=0,
    )
    model, objective = gradients.Towers(), make()
    if wrong:
        energy = objective.parts["energy"]
        plain = energy.forward

        def mean(model: Model, batch: Batch) -> LossOutput:
            output = plain(model, batch)
            pairs = torch.tensor(len(batch["weights"]))
            return LossOutput(sum=output.sum / output.count.clamp(min=1) * pairs, count=pairs)

        energy.forward = mean
    loss, metrics = GradientStep(model=model, objective=objective, plan=plan).run(
        batch, 0, lambda scalar, is_last: scalar.backward()
    )
    found = {key: collectives.all_reduce_sum(value) / world_size for key, value in gradients_of(model, objective)}
    return {"loss": loss, **found, **({} if wrong else {"divergence": metrics["distill/divergence"]})}


def gradients_of(model: torch.nn.Module, objective: Objective) -> Any:
    return gradients.gradients_of(model, objective).items()


def every_step() -> list[dict[str, Tensor]]:
    return [one_step(1), one_step(2), one_step(3), one_step(2, wrong=True)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_that_of_the_formula_for_any_ranks_and_micro_batches(world_size: int) -> None:
    expected = by_formula()
    steps = every_step() if world_size == 1 else run_ranks(every_step, world_size)[0]
    *right, wrong = steps
    for found in right:
        assert found.pop("divergence") > 0.01
        assert gradients.largest_error(found, expected) < 1e-13  # measured 1.2e-15
    assert gradients.largest_error(wrong, expected) > 1e-3  # the twin


def test_a_student_that_is_its_teacher_diverges_in_nothing() -> None:
    objective = Distill(teacher="-", teacher_scale=9.0, init_temperature=1 / 9).double()
    objective.bind(gradients.Towers())
    batch = global_batch()
    output = objective.loss(objective.features(gradients.Towers(), batch))
    assert output.metrics["divergence"][0].item() == pytest.approx(0, abs=1e-12)
    assert output.sum.item() > 1  # the entropy of the teacher is left
    assert not [key for key in objective.state_dict() if "image" in key]  # the teacher is no part of the state


def test_open_clip_distils_by_the_same_loss() -> None:
    from open_clip.loss import DistillClipLoss

    objective = Distill(teacher="-", teacher_scale=9.0).double()
    objective.bind(Teacher())
    student, teacher = gradients.Towers()(global_batch()), Teacher()(global_batch())
    theirs = DistillClipLoss()(
        student["image_features"], student["text_features"], objective.logit_scale.exp(),
        teacher["image_features"], teacher["text_features"], torch.tensor(9.0), output_dict=True,
    )  # fmt: skip
    ours = objective.loss(objective.features(gradients.Towers(), global_batch()))
    assert ours.sum.item() / NUM_PAIRS == pytest.approx(theirs["distill_loss"].item(), rel=1e-12)


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}, {"a": 1.0, "b": -1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_weights_that_do_not_fit_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        WeightedSum(parts={"a": InfoNCE(), "b": InfoNCE()}, weights=weights)


def test_the_parts_keep_what_is_theirs() -> None:
    objective = make()
    assert objective.requires == {"image_features", "text_features"} and objective.reads == frozenset()
    both = WeightedSum(parts={"a": InfoNCE(partners="content")}, weights={"a": 1.0})
    assert both.reads == {"contents"}
    with torch.no_grad():
        objective.parts["contrast"].logit_scale.fill_(50.0)
    objective.after_step()
    assert objective.parts["contrast"].logit_scale.exp().item() == pytest.approx(100.0)
