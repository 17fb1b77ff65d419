"""Pairs of any two modalities: rows that lack one do not count, and no cut of the batch changes the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.errors import ConfigError
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.sigmoid import Sigmoid
from vlm_train.objectives.weighted import WeightedSum
from vlm_train.types import MODALITIES, Batch, Outputs, rank_share

NUM_ROWS = 11
NAMES = ("image", "text", "audio", "depth")
WEIGHTS = {"audio": 1.0, "depth": 0.5, "text": 2.0}
THERE = {"audio": [7, 8, 10], "depth": [0, 2, 3, 4, 9]}  # of two ranks, the first has no sound at all


class Towers(nn.Module):
    """A linear tower for each, of which each part of a batch's `images` is the input."""

    outputs = frozenset(f"{name}_features" for name in NAMES)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for number, name in enumerate(NAMES):
            linear = nn.Linear(5 + number, 4, dtype=torch.float64)
            for parameter in linear.parameters():
                nn.init.normal_(parameter, generator=generator)
            self.add_module(name, linear)

    def forward(self, batch: Batch) -> Outputs:
        fields: Any = batch
        inputs = {name: fields[{"image": "images", "text": "text_ids"}.get(name, name)].double() for name in NAMES}
        return {f"{name}_features": F.normalize(getattr(self, name)(x), dim=1) for name, x in inputs.items()}


def global_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(NUM_ROWS, 5 + number, generator=generator, dtype=torch.float64) for number in range(4)]
    there = torch.zeros(NUM_ROWS, len(MODALITIES), dtype=torch.bool)
    for name, rows in THERE.items():
        there[rows, MODALITIES.index(name)] = True
    weights = torch.ones(NUM_ROWS)
    weights[[4, 10]] = 0  # padding that has everything
    fields = dict(zip(("images", "text_ids", "audio", "depth"), inputs, strict=True))
    return Batch(**fields, there=there, weights=weights)  # type: ignore[typeddict-item]


def make(kind: type = InfoNCE, implementation: str = "gathered") -> WeightedSum:
    pairs = {name: kind(pair=["image", name], implementation=implementation) for name in WEIGHTS}
    return WeightedSum(parts=pairs, weights=WEIGHTS).double()


def rows_of(name: str) -> list[int]:
    return [row for row in THERE.get(name, range(NUM_ROWS)) if row not in (4, 10)]


def by_formula() -> dict[str, Tensor]:
    """Loss and gradients of one process, from the rows that count alone."""
    model, objective = Towers(), make()
    outputs, loss = model(global_batch()), torch.zeros((), dtype=torch.float64)
    for name, weight in WEIGHTS.items():
        rows = rows_of(name)
        image_BD, other_BD = outputs["image_features"][rows], outputs[f"{name}_features"][rows]
        logits = objective.parts[name].logit_scale.exp() * image_BD @ other_BD.T
        right = torch.arange(len(rows))
        loss = loss + weight * (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model, objective)}


def gradients_of(*modules: nn.Module) -> dict[str, Tensor]:
    named = [(name, p.grad) for module in modules for name, p in module.named_parameters()]
    return {name: grad for name, grad in named if grad is not None}


def one_step(num_micro_batches: int, *, implementation: str = "gathered", wrong: bool = False) -> dict[str, Tensor]:
    """The engine's step in this world. `wrong`: what is not there counts."""
    rank, world_size = collectives.rank(), collectives.world_size()
    whole = global_batch()
    if wrong:
        whole["there"] = torch.ones_like(whole["there"])
    start, stop = rank_share(NUM_ROWS, rank, world_size)
    batch = Batch(**{key: value[start:stop] for key, value in whole.items()})  # type: ignore[typeddict-item]
    largest = -(-NUM_ROWS // world_size)
    budgets = Budgets(samples=-(-largest // num_micro_batches))
    plan = StepPlan(global_batch=NUM_ROWS, budgets=budgets, rank=rank, world_size=world_size, seed=0)
    model, objective = Towers(), make(implementation=implementation)
    step = GradientStep(model=model, objective=objective, plan=plan)
    loss, _ = step.run(batch, 0, lambda scalar, is_last: scalar.backward())
    found = gradients_of(model, objective)
    return {"loss": loss, **{key: collectives.all_reduce_sum(grad) / world_size for key, grad in found.items()}}


def every_step() -> list[dict[str, Tensor]]:
    cut = [one_step(k, implementation=how) for k in (1, 2, 3) for how in ("gathered", "tiled")]
    return [*cut, one_step(2, wrong=True)]


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[key] - value).abs().max() / value.abs().max()) for key, value in expected.items())


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_that_of_the_rows_that_have_both(world_size: int) -> None:
    expected = by_formula()
    for result in [every_step()] if world_size == 1 else run_ranks(every_step, world_size):
        *cut, wrong = result
        assert max(largest_error(got, expected) for got in cut) < 1e-13  # the rounding of fp64
        assert largest_error(wrong, expected) > 0.1


@pytest.mark.parametrize("kind", [InfoNCE, Sigmoid])
def test_a_pair_counts_where_both_are_there(kind: type) -> None:
    batch, model = global_batch(), Towers()
    objective = kind(pair=("text", "audio")).double()
    output = objective.loss(objective.features(model, batch))
    assert output.count.item() == objective.count(batch).item() == len(rows_of("audio")) == 2
    assert "accuracy_text_to_audio" in output.metrics
    both = kind(pair=("audio", "depth")).double()  # no sample has both
    output = both.loss(both.features(model, batch))
    assert output.count.item() == both.count(batch).item() == 0 and output.sum.item() == 0
    output.sum.backward()  # and still there is a graph, which other ranks wait for
    assert all(p.grad is not None and not p.grad.any() for p in (*model.audio.parameters(), *model.depth.parameters()))


def test_hard_captions_are_wrong_answers_where_texts_are_asked_for() -> None:
    batch = global_batch()
    batch["hard_text_ids"] = torch.randn(NUM_ROWS, 2, 6, dtype=torch.float64)
    batch["hard_text_mask"] = batch["hard_counts"] = torch.ones(NUM_ROWS, 2, dtype=torch.bool)
    batch["text_mask"] = torch.ones(NUM_ROWS, 1, dtype=torch.bool)
    batch["hard_text_mask"] = torch.ones(NUM_ROWS, 2, 1, dtype=torch.bool)
    seen: list[int] = []

    def model(batch: Batch) -> Outputs:
        seen.append(len(batch["text_ids"]))
        return {name: torch.ones(len(batch["text_ids"]), 4) for name in Towers.outputs}

    assert "hard_features" not in InfoNCE(pair=("image", "audio")).features(model, batch)
    assert "hard_features" in InfoNCE().features(model, batch)
    assert seen == [NUM_ROWS, 3 * NUM_ROWS]


@pytest.mark.parametrize("pair", [[], ["image"], ["image", "image"], ["image", "smell"], ["image", "text", "audio"]])
def test_no_pair_is_refused(pair: list[str]) -> None:
    with pytest.raises(ConfigError, match="cannot match this pair"):
        InfoNCE(pair=pair)
