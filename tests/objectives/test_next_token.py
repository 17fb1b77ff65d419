"""Next-token prediction over dialogues: what is counted, and one loss and one gradient however a global batch is cut,
padded and sharded."""

from __future__ import annotations

import sys
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.engine.micro_batches import Budgets, take_rows
from vlm_train.engine.optim import AdamW
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.models import packing
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.packing import Texts, attend_texts
from vlm_train.objectives.next_token import NextToken
from vlm_train.types import NO_LABEL, Batch, LossOutput, Model, rank_share

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "proof"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import gradients
from generative_toys import logits, make_batch, make_model, make_text, rows_of

# (images, words) of each dialogue; every second one is text, so that cut in 2 x 3 some micro-batch has no image
LAYOUT = ((1, 9), (0, 7), (2, 12), (1, 4), (0, 15), (1, 3), (0, 8), (0, 11), (2, 6))
IGNORED, WITHOUT_LABEL = 3, 6
SECOND_RANK = slice(5, 9)  # of two
PADDINGS = (0, 13)  # tokens behind the longest dialogue
NUM_MICRO_BATCHES = (1, 2, 3)
# of two ranks the first needs 4 micro-batches, the second 2; then 5, of which the second has rows for 4
WEIGHED = (Budgets(tokens=24), Budgets(tokens=20, samples=1), Budgets(tokens=40, images=2))
BAR = 1e-12  # fp64; measured 4e-16 of the loss and of gradients, 4e-15 of weights after a step


def global_batch(name: str = "uneven", padding: int = 0) -> Batch:
    """Unequally many labels a row, one row that does not count, one that has no label; or with a rank whose rows have
    neither label nor image (`silent`)."""
    silent = name == "silent"
    layout = list(LAYOUT)
    layout[SECOND_RANK] = [(0 if silent else images, words) for images, words in LAYOUT[SECOND_RANK]]
    batch = make_batch(tuple(layout))
    batch["weights"] = torch.ones(len(layout))
    batch["weights"][IGNORED] = 0.0
    batch["dialogue_labels"][SECOND_RANK if silent else WITHOUT_LABEL] = NO_LABEL
    batch["dialogue_ids"] = F.pad(batch["dialogue_ids"], (0, padding))
    batch["dialogue_labels"] = F.pad(batch["dialogue_labels"], (0, padding), value=NO_LABEL)
    return batch


def make_tied() -> GenerativeModel:
    """In fp64, with one matrix for what is read and what is told, as in model=llava_tiny."""
    return make_model(text=make_text(tie_word_embeddings=True)).double()


def by_formula(name: str = "uneven") -> dict[str, Tensor]:
    """Loss, gradients and weights after one optimizer step, of one process that reads each dialogue alone."""
    model, batch = make_tied(), global_batch(name)
    rows = [row for row in range(len(LAYOUT)) if batch["weights"][row] != 0]
    terms = []
    for row in rows:
        alone = rows_of(batch, row)
        log_p_TV = logits(model, alone)[0].log_softmax(-1)
        labels = alone["dialogue_labels"][0].tolist()
        terms += [-log_p_TV[place, label] for place, label in enumerate(labels) if label != NO_LABEL]
    loss = torch.stack(terms).mean()
    loss.backward()
    return {"loss": loss.detach(), **gradients.gradients_of(model, NextToken()), **weights_after_a_step(model)}


def weights_after_a_step(model: GenerativeModel) -> dict[str, Tensor]:
    optim = AdamW(lr=1e-2, groups=[{"pattern": ".*", "lr": 1e-2, "weight_decay": 0.1}])
    optim.build(model).step()
    return {f"after {name}": whole(value.detach()) for name, value in model.named_parameters()}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def one_step(
    num_micro_batches: int = 1,
    padding: int = 0,
    *,
    weighed: Budgets | None = None,
    mesh: Any = None,
    objective: NextToken | None = None,
    name: str = "uneven",
) -> dict[str, Tensor]:
    """The engine's step in this world, and one of the optimizer. `weighed`: budgets of dialogues in place of a number
    of micro-batches. `mesh`: of ranks that share the weights."""
    rank, world_size = collectives.rank(), collectives.world_size()
    start, stop = rank_share(len(LAYOUT), rank, world_size)
    largest = -(-len(LAYOUT) // world_size)
    budgets = weighed or Budgets(samples=-(-largest // num_micro_batches))
    plan = StepPlan(global_batch=len(LAYOUT), budgets=budgets, rank=rank, world_size=world_size, seed=0)
    assert weighed or plan.num_micro_batches == num_micro_batches
    model, objective = make_tied(), objective or NextToken()
    if mesh is not None:
        sharding.shard(model, mesh)

    def backward(scalar: Tensor, is_last: bool) -> None:
        sharding.reduce_gradients(model, is_last)
        scalar.backward()

    batch = take_rows(global_batch(name, padding), range(start, stop))
    loss, _ = GradientStep(model=model, objective=objective, plan=plan).run(batch, 0, backward)
    if mesh is None:
        sharding.average_unsharded(model.parameters())
    found = {key: whole(value) for key, value in gradients.gradients_of(model, objective).items()}
    return {"loss": loss, **found, **weights_after_a_step(model)}


# ---- what the promise forbids


class OwnMean(NextToken):
    """Each micro-batch and rank takes the mean over its own labels; then means are averaged."""

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["dialogue_ids"]))

    def forward(self, model: Model, batch: Batch) -> LossOutput:
        output, num_rows = super().forward(model, batch), self.count(batch)
        return LossOutput(sum=output.sum / output.count.clamp(min=1) * num_rows, count=num_rows)


class AcrossBorders(NextToken):
    """The last token of a dialogue is told the first of the one behind it, as where a whole row is shifted."""

    def told(self, batch: Batch) -> Batch:
        labels = batch["dialogue_labels"].clone()
        for row, behind in enumerate(batch["dialogue_ids"][1:]):
            labels[row, batch["dialogue_lengths"][row] - 1] = behind[0]
        return Batch(**{**batch, "dialogue_labels": labels})

    def count(self, batch: Batch) -> Tensor:
        return super().count(self.told(batch))

    def forward(self, model: Model, batch: Batch) -> LossOutput:
        return super().forward(model, self.told(batch))


def leaky(q: Tensor, k: Tensor, v: Tensor, texts: Texts, **others: Any) -> Tensor:
    """Attention that only hides the future of a row: a dialogue reads those before it."""
    return attend_texts(q, k, v, Texts.of([sum(texts.lengths)], q.device), **others)


def every_step() -> dict[str, dict[str, Tensor]]:
    """The steps of this world, by what they are called: those that must be wrong, those beside a silent rank, and all
    others."""
    world_size = collectives.world_size()
    meshes = {"plain": None, **({"fsdp2": init_device_mesh("cpu", (world_size,))} if world_size > 1 else {})}
    found = {
        f"{strategy}, {number} micro-batches, padded by {padding}": one_step(number, padding, mesh=mesh)
        for (strategy, mesh), number, padding in product(meshes.items(), NUM_MICRO_BATCHES, PADDINGS)
    }
    for (strategy, mesh), weighed in product(meshes.items(), WEIGHED):
        found[f"{strategy}, {weighed}"] = one_step(weighed=weighed, mesh=mesh)
    for (strategy, mesh), number in product(meshes.items(), (1, 3)):
        found[f"silent: {strategy}, {number} micro-batches"] = one_step(number, mesh=mesh, name="silent")
    found["wrong: means of means"] = one_step(2, objective=OwnMean())
    found["wrong: labels across borders"] = one_step(1, objective=AcrossBorders())
    with mock.patch.object(packing, "attend_texts", leaky):
        found["wrong: a leak"] = one_step(1)
    return found


@cache
def steps_of(world_size: int) -> dict[str, dict[str, Tensor]]:
    """Of the last rank. What keeps a rank waiting for ever is an error."""
    return every_step() if world_size == 1 else run_ranks(every_step, world_size, timeout=180)[-1]


def errors_of(world_size: int, kind: str | tuple[str, ...], expected: dict[str, Tensor]) -> dict[str, float]:
    found = {name: step for name, step in steps_of(world_size).items() if name.startswith(kind)}
    return {name: gradients.largest_error(step, expected) for name, step in found.items()}


WORLDS = pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])


@WORLDS
def test_loss_gradients_and_weights_are_those_of_the_formula_however_the_batch_is_cut(world_size: int) -> None:
    expected = by_formula()
    errors = errors_of(world_size, ("plain", "fsdp2"), expected)
    assert len(errors) == (6 + len(WEIGHED)) * world_size and max(errors.values()) < BAR, errors
    wrong = errors_of(world_size, "wrong", expected)
    assert len(wrong) == 3 and min(wrong.values()) > 1e-2, wrong
    for name in wrong:  # and its loss alone; measured 2e-3 at least
        assert abs(steps_of(world_size)[name]["loss"] - expected["loss"]) > 1e-4, name


@WORLDS
def test_a_rank_without_a_label_and_without_an_image_takes_part(world_size: int) -> None:
    errors = errors_of(world_size, "silent", by_formula("silent"))
    assert len(errors) == 2 * world_size and max(errors.values()) < BAR, errors


def idle_parameters(model: GenerativeModel, batch: Batch) -> list[str]:
    """Those that a backward pass does not reach: where gradients are exchanged, others would wait for them."""
    model.zero_grad()
    NextToken()(model, batch).sum.backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_batch_without_labels_and_images_reaches_every_parameter_and_moves_none() -> None:
    model, batch = make_tied(), take_rows(global_batch("silent"), range(5, 9))
    assert not batch["num_images"].any() and not idle_parameters(model, batch)
    assert not any(parameter.grad.any() for parameter in model.parameters())  # type: ignore[union-attr]
    output = NextToken()(model, batch)
    assert output.sum.item() == output.count.item() == 0
    with mock.patch.object(GenerativeModel, "_image_tokens", lambda *_: torch.zeros(0, 4, 48)):  # the twin
        assert {name.split(".")[0] for name in idle_parameters(model, batch)} == {"vision", "connector"}


def test_what_is_counted_are_the_labels_of_rows_that_count() -> None:
    model, batch, objective = make_tied(), global_batch(), NextToken()
    output = objective(model, batch)
    found = logits(model, batch)
    places = [
        (row, place, label)
        for row, labels in enumerate(batch["dialogue_labels"].tolist())
        for place, label in enumerate(labels)
        if label != NO_LABEL and row != IGNORED
    ]
    hits = sum(int(found[row, place].argmax()) == label for row, place, label in places)
    assert objective.count(batch).item() == output.count.item() == len(places)
    assert [int(part) for part in output.metrics["accuracy"]] == [hits, len(places)]
    assert [int(part) for part in output.metrics["labels_per_sample"]] == [len(places), len(LAYOUT) - 1]
    per_row = [sum(row == other for row, *_ in places) for other in range(len(LAYOUT))]
    assert per_row[WITHOUT_LABEL] == per_row[IGNORED] == 0 and len({*per_row}) > 4
    batch["weights"][IGNORED] = 1.0  # the twin: padding rows are told, too
    assert objective.count(batch).item() > len(places)


@cache
def shared_model() -> GenerativeModel:
    return make_tied()


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(len(LAYOUT))), cuts=st.sets(st.integers(1, len(LAYOUT) - 1), max_size=3))
def test_sums_and_counts_add_up_in_any_order_and_any_company(order: list[int], cuts: set[int]) -> None:
    model, batch, objective = shared_model(), global_batch(), NextToken()
    borders = [0, *sorted(cuts), len(order)]
    with torch.no_grad():
        together = objective(model, batch)
        parts = [objective(model, rows_of(batch, *order[start:stop])) for start, stop in pairwise(borders)]
    assert sum(part.sum for part in parts).item() == pytest.approx(together.sum.item(), rel=BAR)  # measured 3e-16
    assert sum(part.count for part in parts) == together.count
    for name, (total, count) in together.metrics.items():
        assert sum(part.metrics[name][0] for part in parts) == total
        assert sum(part.metrics[name][1] for part in parts) == count
