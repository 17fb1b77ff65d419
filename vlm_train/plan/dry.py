"""A training run without memory: the model, objective and optimizer of a config as the engine sets them up, and one
step of theirs in which only what is kept is counted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint

from vlm_train import build
from vlm_train.engine import sharding
from vlm_train.errors import ConfigError
from vlm_train.log import get_logger
from vlm_train.objectives.base import CoupledObjective, SeparableObjective
from vlm_train.objectives.contrastive import Contrastive
from vlm_train.objectives.distill import Distill
from vlm_train.plan.batches import make_batch, sample_of
from vlm_train.plan.loss import NO_LOSS, FeatureKind, LossMemory, loss_memory
from vlm_train.plan.shapes import Live, Shapes
from vlm_train.schema import read_config
from vlm_train.types import Batch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes that are neither weights nor gradients while a micro-batch runs. `kept`: when the backward pass begins;
    `peak`: at most; `features`: of those, what a coupled objective reads; 0 of a separable one."""

    kept: int
    peak: int
    features: int


class Learner(nn.Module):
    """Model and objective under the names that patterns of `optim.groups` are matched against."""

    def __init__(self, model: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, objective


class DryRun:
    """What `training.training_module` builds of a config, as shapes; texts of the data, and so a tokenizer that is
    trained on them, are not there.

    Args:
        config: checked and resolved, without stages.
        tokens: of the text or the dialogue of each sample; None: the longest.
        like_a_gpu: whether it is to run on a GPU.

    Raises:
        ConfigError: the config cannot be built, e.g. without the files that it names.
    """

    def __init__(self, config: Any, *, tokens: int | None = None, like_a_gpu: bool = True) -> None:
        self.config, self.like_a_gpu, self.shapes = config, like_a_gpu, Shapes()
        self.parts = build.skeleton(config)
        self.teacher = _teacher(self.parts.objective)
        if config.precision.name == "fp64":
            self.parts.model.double()
            self.parts.objective.double()
        self.learner = Learner(self.parts.model, self.parts.objective)
        optim: Any = build.make(config.optim)
        optim.apply_frozen(self.learner)
        self.learner.train()
        self.average = copy.deepcopy(self.parts.model).requires_grad_(False) if optim.ema_decay else None
        for module in filter(None, (self.learner, self.average)):
            self.shapes.place(module)
        with _unsaid():
            self.optimizer: torch.optim.Optimizer = optim.build(self.learner)
        self.sample = sample_of(self.parts.model, tokens, config.data.hard_captions)
        self.implementation = "gathered"
        for part in self.parts.objective.modules():
            if isinstance(part, Contrastive) and part.implementation != "gathered":
                self.implementation = part.implementation
                part.implementation = "gathered"  # which is run; tiles are counted by `loss.py`
        self._known: dict[int, Activations] = {}
        self._kinds: dict[str, FeatureKind] = {}
        self._stepped = False

    @property
    def is_coupled(self) -> bool:
        """Whether every sample of a step meets every other."""
        return isinstance(self.parts.objective, CoupledObjective)

    def recompute(self) -> None:
        """From now on activations inside blocks are computed again in the backward pass."""
        for block in sharding.blocks_of(self.parts.model):
            checkpoint(block)
        self._known = {}

    def batch(self, num_rows: int) -> Batch:
        """A batch of so many samples."""
        return make_batch(self.shapes, self.parts, self.sample, num_rows)

    def activations(self, num_rows: int) -> Activations:
        """Of a micro-batch of so many samples, forward and backward."""
        if num_rows not in self._known:
            self._known[num_rows] = self._run(num_rows)
        return self._known[num_rows]

    @functools.cached_property
    def loss(self) -> LossMemory:
        """What a coupled objective takes when a step's features meet."""
        objective = self.parts.objective
        if not isinstance(objective, CoupledObjective):
            return NO_LOSS
        if not self._known:
            self.activations(2)
        return loss_memory(objective, self._kinds, self.shapes, self.implementation)

    def learning(self) -> list[nn.Parameter]:
        """Parameters that get a gradient, and so have optimizer state; the others cost their values alone."""
        self._step()
        return [parameter for parameter in self.learner.parameters() if parameter.grad is not None]

    def optimizer_tensors(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, state) of everything that the optimizer keeps after a step."""
        self._step()
        states = self.optimizer.state.items()
        return [(parameter, value) for parameter, slots in states for value in slots.values()]

    def _run(self, num_rows: int) -> Activations:
        batch, features = self.batch(num_rows), 0
        precision = self.config.precision.name
        autocast = torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST)
        there = [*self.learner.parameters(), *self.learner.buffers(), *tensors_of(batch)]
        there += [] if self.teacher is None else [*self.teacher.parameters(), *self.teacher.buffers()]
        with self.shapes.running(like_a_gpu=self.like_a_gpu), Live(there) as live, autocast:
            scalar, features = self._forward(batch)
            kept = live.bytes
            scalar.backward()
            peak = live.peak_without([p.grad for p in self.learner.parameters() if p.grad is not None])
        return Activations(kept=kept, peak=peak, features=features)

    def _forward(self, batch: Batch) -> tuple[Tensor, int]:
        """What is sent back through the model, and the bytes of a coupled objective's features."""
        objective, model = self.parts.objective, self.parts.model
        if isinstance(objective, SeparableObjective):
            return objective(model, batch).sum, 0
        assert isinstance(objective, CoupledObjective)
        features = objective.features(model, batch)  # type: ignore[arg-type]
        self._kinds = {name: FeatureKind.of(value) for name, value in features.items()}
        learning = [value for value in features.values() if value.requires_grad]
        total = torch.stack([value.sum().float() for value in learning]).sum()
        return total, sum(_size(value) for value in features.values())

    def _step(self) -> None:
        """One step of the optimizer, once; an objective's own parameters have gradients of the whole batch."""
        if self._stepped:
            return
        if not self._known:
            self.activations(2)
        with self.shapes.running():
            for parameter in self.parts.objective.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            self.optimizer.step()
        self._stepped = True


@contextmanager
def _unsaid() -> Iterator[None]:
    """What an optimizer tells of its groups is told where it trains."""
    log = get_logger("vlm_train.engine.optim")
    before = log.level
    log.setLevel("WARNING")
    try:
        yield
    finally:
        log.setLevel(before)


def tensors_of(batch: Batch) -> list[Tensor]:
    """The fields of a batch that are tensors."""
    return [value for value in batch.values() if isinstance(value, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind tensors, each counted once."""
    return sum({id(tensor): _size(tensor) for tensor in tensors}.values())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _teacher(objective: nn.Module) -> nn.Module | None:
    """The model of the run that an objective distils from, bound to it, as shapes."""
    for part in objective.modules():
        if isinstance(part, Distill):
            where = Path(part.teacher)
            if not (where / "config.yaml").is_file():
                raise ConfigError("the teacher is not there", got=part.teacher, allowed="the folder of a finished run",
                                  remedy="vlm-train import, or train it first")  # fmt: skip
            model = build.skeleton(read_config(where)).model
            Shapes().place(model)
            part.bind(model)
            return model
    return None
