"""Proof: the contrastive gradients do not depend on ranks, micro-batches or the way they are computed.

    python scripts/proof/gradients.py [--full] [--json FILE]       # CPU, about a minute and a half

One global batch of image-text pairs is trained on by 1, 2 and 4 real processes (gloo, fp64) that hold unequal numbers
of pairs, one padding row each and, at 4, a rank with none, in 1, 2 and 3 micro-batches (cached two-pass: features
without graph, loss on all of them, then each micro-batch again with its features' gradient), with every feature
gathered and with texts that travel round the ranks. The losses: InfoNCE, sigmoid, InfoNCE with hard captions, and
InfoNCE where pairs that share an image or a caption are partners. The loss and the gradient of both towers, of the
temperature and of the bias are compared with one process that forms the whole N x N matrix by a formula of its own. The
value of a row is the largest relative error of these.

Then the same through the engine's own step under DistributedDataParallel and under FSDP2, which average the gradients,
at the shares that it deals out.

Each row has a control, an error that public trainers have shipped, measured in the same way; it must fail the bar:
features of other ranks left out; their gradient left out; the temperature's gradient added up K times; padding rows
counted; each rank left with the gradient of its own pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice, product
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _table import Row, arguments, report
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlm_train.distributed import collectives, ring
from vlm_train.distributed.ring import Hop
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.objectives import tiled
from vlm_train.objectives.contrastive import Contrastive
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.sigmoid import Sigmoid
from vlm_train.types import Batch, rank_share

BAR = 1e-10  # fp64; measured 1e-15
Make = Callable[..., Contrastive]
OBJECTIVES: dict[str, Make] = {
    "infonce": InfoNCE,
    "sigmoid": Sigmoid,
    "negclip": InfoNCE,
    "multi-positive": partial(InfoNCE, partners="content"),
}
IMPLEMENTATIONS = ("gathered", "tiled")
STRATEGIES = ("ddp", "fsdp2")
NUM_HARD = 2
SHARES = {1: [11], 2: [7, 4], 4: [5, 0, 4, 2]}  # pairs per rank
NUM_PAIRS = 11  # of the engine's steps: at 4 ranks and 3 micro-batches one of them is empty
LONG_SHARES = {1: [96], 2: [60, 36], 4: [50, 0, 45, 1]}

NOT_GATHERED = "features of others left out"
NO_GRADIENT = "gradients of others left out"
TEMPERATURE = "temperature x K"
PADDING = "padding counted"
NOT_REDUCED = "each rank alone"


class Towers(nn.Module):
    """Two small nonlinear towers with the outputs of a dual encoder."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.image = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8))
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image, text = self.image(batch["images"]), self.text(batch["text_ids"])
        return {"image_features": F.normalize(image, dim=1), "text_features": F.normalize(text, dim=1)}


def global_batch(name: str, num_pairs: int) -> Batch:
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(num_pairs, 6, dtype=torch.float64, generator=generator)
    texts = torch.randn(num_pairs, 5, dtype=torch.float64, generator=generator)
    batch = Batch(images=images, text_ids=texts, text_mask=texts > -9, weights=torch.ones(num_pairs))
    if name == "negclip":
        batch["hard_text_ids"] = torch.randn(num_pairs, NUM_HARD, 5, dtype=torch.float64, generator=generator)
        batch["hard_text_mask"] = batch["hard_text_ids"] > -9
        batch["hard_counts"] = torch.rand(num_pairs, NUM_HARD, generator=generator) < 0.7  # some samples have fewer
    if name == "multi-positive":  # about every second pair shares its image or its caption with another
        batch["contents"] = torch.randint(0, 2 * num_pairs, (num_pairs, 2), generator=generator)
    return batch


def rank_batch(name: str, shares: list[int]) -> Batch:
    """This rank's pairs, and one padding row of weight 0 that repeats the first pair of the global batch."""
    start = sum(shares[: collectives.rank()])
    rows = [*range(start, start + shares[collectives.rank()]), 0]
    batch = Batch(**{key: value[rows] for key, value in global_batch(name, sum(shares)).items()})
    batch["weights"] = torch.tensor([1.0] * (len(rows) - 1) + [0.0])
    return batch


def dense_loss(name: str, batch: Batch, model: Towers, objective: Contrastive) -> Tensor:
    """The mean loss by its formula, on one process, from the N x N matrix."""
    features, num_pairs = model(batch), len(batch["images"])
    scale = objective.logit_scale.exp()
    logits = scale * features["image_features"] @ features["text_features"].T
    partners = torch.eye(num_pairs, dtype=torch.bool)
    if name == "sigmoid":
        sign = 2 * partners.to(logits.dtype) - 1
        return torch.log1p(torch.exp(-sign * (logits + objective.logit_bias))).sum() / num_pairs
    if name == "multi-positive":
        image, caption = batch["contents"].unbind(1)
        partners = (image[:, None] == image) | (caption[:, None] == caption)
    target = partners / partners.sum(1, keepdim=True).double()
    wide = logits
    if name == "negclip":
        hard = batch["hard_text_ids"][batch["hard_counts"]]
        hard_features = model(Batch(images=batch["images"], text_ids=hard))["text_features"]
        wide = torch.cat([logits, scale * features["image_features"] @ hard_features.T], dim=1)
    rows = wide.logsumexp(1) - (target * logits).sum(1)
    columns = logits.logsumexp(0) - (target.T * logits).sum(0)
    return (rows + columns).sum() / (2 * num_pairs)


def reference(name: str, num_pairs: int) -> dict[str, Tensor]:
    """Loss and gradients of one process."""
    model, objective = Towers(), OBJECTIVES[name]().double()
    loss = dense_loss(name, global_batch(name, num_pairs), model, objective)
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model, objective)}


def gradients_of(model: nn.Module, objective: nn.Module) -> dict[str, Tensor]:
    parameters = nn.ModuleDict({"model": model, "objective": objective}).named_parameters()
    return {key: torch.zeros_like(value) if value.grad is None else value.grad for key, value in parameters}


def micro_batches(batch: Batch, num_micro_batches: int) -> list[Batch]:
    """Cuts a batch; a rank with few rows gets empty micro-batches, as it must still take part."""
    cuts = {key: value.tensor_split(num_micro_batches) for key, value in batch.items()}
    return [Batch(**{key: parts[index] for key, parts in cuts.items()}) for index in range(num_micro_batches)]


def step(model: Towers, objective: Contrastive, batch: Batch, num_micro_batches: int) -> Tensor:
    """One step as the engine takes it, up to the averaging of gradients over ranks; returns the global mean loss."""
    parts = micro_batches(batch, num_micro_batches)
    global_count = collectives.all_reduce_sum(objective.count(batch))
    with torch.no_grad():
        cached = [objective.features(model, part) for part in parts]
    joined = {key: torch.cat([features[key] for features in cached]) for key in cached[0]}
    leaves = {key: value.requires_grad_() for key, value in joined.items() if value.dtype == torch.float64}
    output = objective.loss(joined)
    # in this order: world size / count of two integers would be a float32
    (output.sum * collectives.world_size() / global_count).backward()
    position = 0
    for part in parts:
        features = objective.features(model, part)
        rows = slice(position, position := position + len(part["images"]))
        torch.autograd.backward([features[key] for key in leaves], [leaf.grad[rows] for leaf in leaves.values()])
    return collectives.all_reduce_sum(output.sum) / global_count


def shipped_error(control: str, implementation: str) -> Iterator[Any]:
    """Patches that make the exchange wrong as public trainers have it."""
    right, blocks = collectives.gather_rows, tiled.travelling
    if (control, implementation) == (NO_GRADIENT, "gathered"):
        # times zero: the graph stays whole, the gradient is gone
        zeroed = lambda x, counts=None: right(x.detach(), counts) + 0 * x.sum().to(x.dtype)  # noqa: E731
        yield mock.patch.object(collectives, "gather_rows", zeroed)
    if (control, implementation) == (NO_GRADIENT, "tiled"):
        # what other ranks add to a travelling gradient is lost; sums of exponentials are merged as ever
        yield mock.patch.object(torch, "add", lambda before, part: before)
    if (control, implementation) == (NOT_GATHERED, "gathered"):
        yield mock.patch.object(collectives, "gather_rows", lambda x, counts=None: x)
        yield mock.patch.object(collectives, "row_counts", lambda x: [len(x)])
        yield mock.patch.object(collectives, "rank", lambda: 0)
    if (control, implementation) == (NOT_GATHERED, "tiled"):
        yield mock.patch.object(tiled, "travelling", lambda tensors, counts: islice(blocks(tensors, counts), 1))
        yield mock.patch.object(ring, "pass_on", lambda tensors: Hop([], list(tensors), list(tensors)))


def one_step(
    name: str, implementation: str, shares: list[int], num_micro_batches: int, control: str | None
) -> dict[str, Tensor]:
    """Loss and averaged gradients of this world, right or with one deliberate error."""
    model, batch = Towers(), rank_batch(name, shares)
    objective = OBJECTIVES[name](implementation=implementation).double()
    with ExitStack() as stack:
        if control == PADDING:
            batch["weights"] = torch.ones_like(batch["weights"])
        for patch in shipped_error(control or "", implementation):
            stack.enter_context(patch)
        loss = step(model, objective, batch, num_micro_batches)
    result = gradients_of(model, objective)
    if control == TEMPERATURE:
        result.update({key: num_micro_batches * value for key, value in result.items() if key.startswith("objective")})
    averaged = {key: collectives.all_reduce_sum(value) / len(shares) for key, value in result.items()}
    return {"loss": loss, **averaged}


class EngineStep(nn.Module):
    """The engine's step under a strategy that averages gradients over ranks, as the LightningModule drives it."""

    def __init__(self, name: str, implementation: str, strategy: str, plan: StepPlan) -> None:
        super().__init__()
        self.model, self.objective = Towers(), OBJECTIVES[name](implementation=implementation).double()
        if strategy == "fsdp2":
            sharding.shard(self.model, init_device_mesh("cpu", (plan.world_size,)))
        self.parallel = [DistributedDataParallel(self)] if strategy == "ddp" else []  # a list, or it were its own child
        self.gradient_step = GradientStep(model=self.model, objective=self.objective, plan=plan)

    def run(self, batch: Batch, reduced: bool) -> dict[str, Tensor]:
        """Loss and gradients; `reduced` False is the error that leaves them to each rank."""

        def backward(scalar: Tensor, is_last: bool) -> None:
            sharding.reduce_gradients(self.model, is_last and reduced)
            with ExitStack() as stack:
                for parallel in self.parallel:
                    if is_last and reduced:
                        parallel.reducer.prepare_for_backward([])
                    else:
                        stack.enter_context(parallel.no_sync())
                scalar.backward()

        loss, _ = self.gradient_step.run(batch, 0, backward)
        if not self.parallel and reduced:
            sharding.average_unsharded(self.objective.parameters())
        return {"loss": loss, **{key: _whole(value) for key, value in gradients_of(self.model, self.objective).items()}}


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def engine_step(
    name: str, implementation: str, strategy: str, num_pairs: int, num_micro_batches: int, reduced: bool
) -> dict[str, Tensor]:
    """Loss and gradients of this rank after one step of the engine over `num_pairs` in K micro-batches."""
    rank, world_size = collectives.rank(), collectives.world_size()
    start, stop = rank_share(num_pairs, rank, world_size)
    batch = Batch(**{key: value[start:stop] for key, value in global_batch(name, num_pairs).items()})
    largest = -(-num_pairs // world_size)
    plan = StepPlan(
        global_batch=num_pairs,
        budgets=Budgets(samples=-(-largest // num_micro_batches)),
        rank=rank,
        world_size=world_size,
        seed=0,
    )
    assert plan.num_micro_batches == num_micro_batches
    return EngineStep(name, implementation, strategy, plan).run(batch, reduced)


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error (norm of the difference over norm) of the loss and of every gradient."""
    errors = [(got[key] - value).norm() / value.norm() for key, value in expected.items()]
    return float(torch.stack(errors).max())  # unlike Python's max, this one lets a NaN through


def controls(world_size: int, num_micro_batches: int) -> list[str]:
    """The errors that can exist in this world."""
    names = [PADDING]
    names += [NOT_GATHERED, NO_GRADIENT] if world_size > 1 else []
    return names + ([TEMPERATURE] if num_micro_batches > 1 else [])


def measure(shares: list[int], all_num_micro_batches: list[int]) -> list[dict[str, float | str]]:
    """Every row of one world. Runs on each of its ranks."""
    rows: list[dict[str, float | str]] = []
    for name, implementation in product(OBJECTIVES, IMPLEMENTATIONS):
        expected = reference(name, sum(shares))
        for num_micro_batches in all_num_micro_batches:
            world = (name, implementation, shares, num_micro_batches)
            value = largest_error(one_step(*world, None), expected)
            for control in controls(len(shares), num_micro_batches):
                wrong = largest_error(one_step(*world, control), expected)
                claim = f"{name}, {implementation}: {shares} pairs, {num_micro_batches} micro-batches [{control}]"
                rows.append({"claim": claim, "value": value, "control": wrong})
    return rows


def measure_engine(num_pairs: int, all_num_micro_batches: list[int]) -> list[dict[str, float | str]]:
    """Every row of the engine's step in this world. Runs on each of its ranks; the worst of them speaks."""
    rows: list[dict[str, float | str]] = []
    for name, implementation, strategy in product(OBJECTIVES, IMPLEMENTATIONS, STRATEGIES):
        expected = reference(name, num_pairs)
        for num_micro_batches in all_num_micro_batches:
            world = (name, implementation, strategy, num_pairs, num_micro_batches)
            value, wrong = (
                float(collectives.all_reduce_max(torch.tensor(largest_error(engine_step(*world, reduced), expected))))
                for reduced in (True, False)
            )
            where = f"{strategy} x {collectives.world_size()}, {num_micro_batches} micro-batches"
            rows.append(
                {"claim": f"{name}, {implementation}: {where} [{NOT_REDUCED}]", "value": value, "control": wrong}
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    layouts = [SHARES, LONG_SHARES] if options.full else [SHARES]
    all_num_micro_batches = [1, 2, 3, 5] if options.full else [1, 2, 3]
    rows = []
    for world_size in (1, 2, 4):
        for layout in layouts:
            # ranks agree on the averaged gradients, so rank 0 speaks for all
            world = (layout[world_size], all_num_micro_batches)
            measured = measure(*world) if world_size == 1 else run_ranks(measure, world_size, *world)[0]
            rows += [Row(bar=BAR, sense="<=", **row) for row in measured]
    for world_size in (2, 4):
        measured = run_ranks(measure_engine, world_size, NUM_PAIRS, [1, 2, 3])[0]
        rows += [Row(bar=BAR, sense="<=", **row) for row in measured]
    return report(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
