"""Captioning and CoCa: chunked logits, what is counted, one gradient for any ranks and micro-batches, open_clip."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.engine.micro_batches import Budgets, take_rows
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.objectives.captioning import Captioning
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.token_nll import token_nll
from vlm_train.objectives.weighted import WeightedSum
from vlm_train.types import Batch, LossOutput, Model, rank_share

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "proof"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import gradients
from captioner_toys import make_batch, make_captioner

NUM_PAIRS, IGNORED = 9, 4
WEIGHTS = {"contrast": 1.0, "caption": 2.0}


def rows(num_rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, a vocabulary of 13, labels."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(num_rows, 5, generator=generator), torch.randn(13, 5, generator=generator)
    labels = torch.randint(0, 13, (num_rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.sampled_from([1, 13, 40, 10_000]))
def test_logits_in_chunks_are_the_logits(num_rows: int, max_logits: int) -> None:
    hidden, weight, labels = rows(num_rows)
    total, hits = token_nll(hidden, weight, labels, max_logits=max_logits)
    found = torch.autograd.grad(total * 0.3, [hidden, weight])
    logits = hidden @ weight.T
    expected = -logits.log_softmax(1)[torch.arange(num_rows), labels].sum()
    assert total.item() == pytest.approx(expected.item(), abs=1e-12)
    assert hits.item() == (logits.argmax(1) == labels).sum().item()
    for mine, right in zip(found, torch.autograd.grad(expected * 0.3, [hidden, weight]), strict=True):
        assert torch.allclose(mine, right, atol=1e-13)  # measured 4e-16
    if num_rows > 1:  # the twin: a chunk forgotten
        assert abs(token_nll(hidden[1:], weight, labels[1:])[0].item() - expected.item()) > 1e-4


def test_the_gradient_is_that_of_finite_differences() -> None:
    hidden, weight, labels = rows(4)
    assert torch.autograd.gradcheck(lambda h, w: token_nll(h, w, labels, max_logits=26)[0], (hidden, weight))


def test_nothing_is_kept_that_grows_with_the_vocabulary_times_the_text() -> None:
    hidden, weight, labels = rows(400)

    def kept(loss: Callable[[], object]) -> int:
        """Bytes that wait for the backward pass."""
        found: dict[int, Tensor] = {}
        with saved_tensors_hooks(lambda x: found.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x):
            loss()
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    chunked = kept(lambda: token_nll(hidden, weight, labels, max_logits=130))
    assert chunked < sum(tensor.untyped_storage().nbytes() for tensor in (hidden, weight, labels)) + 100
    assert kept(lambda: F.cross_entropy(hidden @ weight.T, labels)) > chunked + 8 * 400 * 13  # the twin: the plain form


def test_logits_are_wide_under_autocast() -> None:
    hidden, weight, labels = rows(30, torch.float32)
    plain = token_nll(hidden, weight, labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = token_nll(hidden, weight, labels)[0]
        twin = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert torch.equal(low, plain) and abs(twin.item() - plain.item()) > 1e-3
    assert token_nll(hidden.bfloat16(), weight.bfloat16(), labels)[0].dtype == torch.float32


def test_labels_are_the_next_tokens_of_rows_that_count() -> None:
    model, batch, objective = make_captioner(), make_batch(6), Captioning()
    batch["weights"][2] = 0.0
    output = objective(model, batch)
    log_p = (model(batch)["caption_hidden"] @ model.vocabulary.weight.T).log_softmax(-1)
    terms = [
        -log_p[row, place, batch["text_ids"][row, place + 1]].item()
        for row in (0, 1, 3, 4, 5)
        for place in range(int(batch["text_mask"][row].sum()) - 1)
    ]
    assert output.sum.item() == pytest.approx(sum(terms), rel=1e-12)
    assert output.count.item() == objective.count(batch).item() == len(terms)
    assert 0 <= output.metrics["accuracy"][0] <= output.count


def test_padding_cannot_change_the_loss() -> None:
    model, batch, objective = make_captioner(), make_batch(6, longest=5), Captioning()
    plain = objective(model, batch)
    padded = Batch(**batch)
    padded["text_ids"] = F.pad(torch.where(batch["text_mask"], batch["text_ids"], 31), (0, 2), value=31)
    padded["text_mask"] = F.pad(batch["text_mask"], (0, 2))
    other = objective(model, padded)
    assert other.sum.item() == pytest.approx(plain.sum.item(), rel=1e-12) and other.count == plain.count
    padded["text_mask"] = torch.ones_like(padded["text_mask"])  # the twin: padding is told, too
    assert objective(model, padded).sum.item() > plain.sum.item() + 1


def test_a_batch_of_padding_only_has_a_graph() -> None:
    model, batch = make_captioner(), make_batch(2)
    batch["weights"] = torch.zeros(2)
    output = Captioning()(model, batch)
    output.sum.backward()
    assert output.sum.item() == output.count.item() == 0
    assert model.vocabulary.weight.grad is not None and not model.vocabulary.weight.grad.any()


def global_batch() -> Batch:
    """Uneven texts, so that ranks and micro-batches hold unequal numbers of labels; one row that does not count."""
    batch = make_batch(NUM_PAIRS)
    batch["weights"][IGNORED] = 0.0
    return batch


def make_objective() -> WeightedSum:
    return WeightedSum(parts={"contrast": InfoNCE(), "caption": Captioning()}, weights=WEIGHTS).double()


def by_formula() -> dict[str, Tensor]:
    """Loss and gradients of one process from the formulas alone."""
    batch, model, objective = global_batch(), make_captioner(), make_objective()
    outputs, keep = model(batch), batch["weights"] != 0
    images, texts = outputs["image_features"][keep], outputs["text_features"][keep]
    logits, right = objective.parts["contrast"].logit_scale.exp() * images @ texts.T, torch.arange(len(images))
    contrast = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    ids, mask = batch["text_ids"][keep][:, 1:], batch["text_mask"][keep][:, 1:]
    words = outputs["caption_hidden"][keep][:, :-1] @ model.vocabulary.weight.T
    loss = contrast + 2 * F.cross_entropy(words[mask], ids[mask])
    loss.backward()
    return {"loss": loss.detach(), **gradients.gradients_of(model, objective)}


def one_step(num_micro_batches: int, *, sharded: bool = False, wrong: bool = False) -> dict[str, Tensor]:
    """The engine's step in this world. `wrong`: each micro-batch and rank takes a mean of its own captions."""
    rank, world_size = collectives.rank(), collectives.world_size()
    start, stop = rank_share(NUM_PAIRS, rank, world_size)
    largest = -(-NUM_PAIRS // world_size)
    plan = StepPlan(
        global_batch=NUM_PAIRS,
        budgets=Budgets(samples=-(-largest // num_micro_batches)),
        rank=rank,
        world_size=world_size,
        seed=0,
    )
    assert plan.num_micro_batches == num_micro_batches
    model, objective = make_captioner(), make_objective()
    if wrong:
        objective.parts["caption"].forward = own_mean
    if sharded:
        sharding.shard(model, init_device_mesh("cpu", (world_size,)))

    def backward(scalar: Tensor, is_last: bool) -> None:
        sharding.reduce_gradients(model, is_last)
        scalar.backward()

    batch = take_rows(global_batch(), range(start, stop))
    loss, _ = GradientStep(model=model, objective=objective, plan=plan).run(batch, 0, backward)
    found = gradients.gradients_of(model, objective)
    return {"loss": loss, **{key: averaged(value) for key, value in found.items()}}


def averaged(gradient: Tensor) -> Tensor:
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    return collectives.all_reduce_sum(gradient) / collectives.world_size()


def own_mean(model: Model, batch: Batch) -> LossOutput:
    output = Captioning()(model, batch)
    num_rows = torch.tensor(len(batch["weights"]))
    return LossOutput(sum=output.sum / output.count.clamp(min=1) * num_rows, count=num_rows)


def every_step() -> list[dict[str, Tensor]]:
    sharded = [one_step(1, sharded=True), one_step(3, sharded=True)] if collectives.world_size() > 1 else []
    return [one_step(1), one_step(2), one_step(3), *sharded, one_step(2, wrong=True)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_that_of_the_formula_for_any_ranks_and_micro_batches(world_size: int) -> None:
    expected = by_formula()
    *right, wrong = every_step() if world_size == 1 else run_ranks(every_step, world_size)[0]
    assert len(right) == (3 if world_size == 1 else 5)
    for found in right:
        assert gradients.largest_error(found, expected) < 1e-13  # measured 3.1e-15
    assert gradients.largest_error(wrong, expected) > 1e-3  # the twin


def test_open_clips_loss_is_the_same() -> None:
    from open_clip.loss import CoCaLoss

    model, objective, batch = make_captioner(), make_objective(), make_batch(NUM_PAIRS)
    outputs = model(batch)
    loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    theirs = loss(
        outputs["image_features"], outputs["text_features"],
        outputs["caption_hidden"][:, :-1] @ outputs["caption_vocabulary"].T, batch["text_ids"][:, 1:],
        objective.parts["contrast"].logit_scale.exp(), output_dict=True,
    )  # fmt: skip
    ours = objective.loss(objective.features(model, batch))
    means = {key: (total / count).item() for key, (total, count) in ours.metrics.items()}
    assert means["contrast/loss"] == pytest.approx(theirs["contrastive_loss"].item(), rel=1e-12)
    assert 2 * means["caption/loss"] == pytest.approx(theirs["caption_loss"].item(), rel=1e-12)
    assert ours.sum.item() / NUM_PAIRS == pytest.approx(sum(theirs.values()).item(), rel=1e-12)
    assert 0 <= means["caption/accuracy"] <= 1
