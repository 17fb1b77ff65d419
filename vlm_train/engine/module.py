"""THE LightningModule: one `training_step` is one optimizer step, whatever the objective, the model and the machine.

Order within a step: learning rate from the schedule, gradients of the whole global batch (steps.py), clip, optimizer,
the objective's own clamp, moving average. The module knows no task: it calls a model and an objective by protocol.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint

from vlm_train import imaging
from vlm_train.engine import sharding
from vlm_train.engine.ledger import Ledger
from vlm_train.engine.norms import Learning
from vlm_train.engine.optim import AdamW
from vlm_train.engine.schedule import Schedule
from vlm_train.engine.steps import GradientStep, StepPlan
from vlm_train.models.attention import Backend, choose_attention
from vlm_train.objectives.base import Objective
from vlm_train.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Transforms:
    """What is done to what trains, in place and in this order, before it is sharded.

    `attention`: the kernel of every attention of ours. Of every block of the model, `recompute`: activations inside are
    not kept but computed again in the backward pass (activation checkpointing, arXiv 1604.06174); `compile`:
    torch.compile, where one graph serves all equal blocks.
    """

    attention: Backend = "sdpa"
    recompute: bool = False
    compile: bool = False

    def apply(self, module: TrainingModule, device: torch.device) -> None:
        """Parameter names stay as they are. Raises ConfigError where the kernel cannot run on `device`."""
        choose_attention(module, self.attention, device)
        for block in sharding.blocks_of(module.model):
            if self.recompute:
                checkpoint(block)
            if self.compile:
                block.compile()


class TrainingModule(lightning.LightningModule):
    """Model + objective + how they learn.

    Args:
        model: a `types.Model`.
        objective: what trains it.
        optim: groups, clipping and averaging.
        schedule: step -> factor of the peak learning rate.
        plan: how the global batch is cut.
        transforms: what is done to the model's blocks before it trains.
        ledger: told which kind of work begins; None: nobody asks for it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        optim: AdamW,
        schedule: Schedule,
        plan: StepPlan,
        transforms: Transforms = Transforms(),
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.objective = model, objective
        self.optim, self.schedule = optim, schedule
        optim.apply_frozen(self)
        self.train()  # towers that are now frozen go into evaluation mode
        # a child module, so that checkpoints, devices and (later) sharding treat it like the weights it averages
        self.averaged_model = copy.deepcopy(model).requires_grad_(False) if optim.ema_decay else None
        self.gradient_step = GradientStep(model=model, objective=objective, plan=plan)  # type: ignore[arg-type]
        self.transforms: Transforms | None = transforms
        self.ledger = ledger if ledger is not None else Ledger()
        self._learning: Learning | None = None

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that evaluation and export use: the moving average where there is one."""
        return self.averaged_model if self.averaged_model is not None else self.model

    def configure_model(self) -> None:
        """Transforms the model, once, when the strategy knows where the ranks are."""
        if self.transforms is None:
            return
        with self.trainer.precision_plugin.forward_context():
            self.transforms.apply(self, self.trainer.strategy.root_device)
        if self.device_mesh is not None:
            for model in (self.model, self.averaged_model):
                if model is not None:
                    sharding.shard(model, self.device_mesh["data_parallel"])
        self.transforms = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer; the schedule is applied by the step itself."""
        return self.optim.build(_LearningView(self))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch has come."""
        self.ledger.switch("host_to_device")
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Colours that the loader's workers drew and left to this device."""
        finish = batch.pop("finish", None)
        if finish is not None:
            batch["images"] = imaging.recolour(batch["images"], finish)
        self.ledger.switch("overhead")
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step. Returns `row`, python numbers: loss, lr, the objective's metrics, and norms of gradients
        (before they are clipped) and weights (behind the step), of all that learns and by part."""
        step = batch["step"]
        self.ledger.at(step + 1)
        self.ledger.switch("compute")
        optimizer: Any = self.optimizers()
        factor = self.schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.zero_grad()
        loss, metrics = self.gradient_step.run(batch, step, self._backward)
        if self.device_mesh is not None:
            sharding.average_unsharded(self.objective.parameters())
        self.ledger.switch("optimizer")
        grad_norm, grad_norms = self._clip(optimizer)
        optimizer.step()
        self.objective.after_step()
        self._average()
        param_norms = self._learns(optimizer).of_parameters()
        self.ledger.switch("compute")
        row = {
            "loss": loss,
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "grad_norm": grad_norm,
            **metrics,
            **param_norms,
            **grad_norms,
        }
        numbers = _numbers(row)  # waits for a GPU to be through with the step
        self.ledger.switch("overhead")
        return {"row": numbers}  # a tensor named loss would be Lightning's

    def _backward(self, scalar: Tensor, is_last: bool) -> None:
        self.ledger.switch("compute")  # and a sign of life: a step of many micro-batches takes long
        sharding.reduce_gradients(self.model, is_last)
        wrapper: Any = self.trainer.strategy.model
        if is_last or not hasattr(wrapper, "no_sync"):
            self.manual_backward(scalar)
        else:
            with wrapper.no_sync():
                self.manual_backward(scalar)

    def _learns(self, optimizer: Any) -> Learning:
        if self._learning is None:
            self._learning = Learning(optimizer.param_groups)
        return self._learning

    def _clip(self, optimizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        learning = self._learns(optimizer)
        norm, by_part = learning.of_gradients()
        if self.optim.grad_clip is not None:
            for part in sharding.parted([p for p in learning.parameters if p.grad is not None]):
                torch.nn.utils.clip_grads_with_norm_(part, self.optim.grad_clip, norm)
        return norm, by_part

    @torch.no_grad()
    def _average(self) -> None:
        """averaged += (1 - decay) * (weights - averaged), after the clamp: an average of weights that were used."""
        if self.averaged_model is None or self.optim.ema_decay is None:
            return
        pairs = zip(self.averaged_model.parameters(), self.model.parameters(), strict=True)
        averages, weights = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(sharding.local(averages), sharding.local(weights), 1 - self.optim.ema_decay)
        for average, buffer in zip(self.averaged_model.buffers(), self.model.buffers(), strict=True):
            average.copy_(buffer)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Python's numbers of a row, by one copy from the device."""
    tensors = {name: value for name, value in row.items() if isinstance(value, Tensor)}
    numbers = torch.stack([value.detach().double() for value in tensors.values()]).tolist()
    return {**row, **dict(zip(tensors, numbers, strict=True))}


class _LearningView(nn.Module):
    """The module without its moving average: what the optimizer's patterns are matched against."""

    def __init__(self, module: TrainingModule) -> None:
        super().__init__()
        self.model, self.objective = module.model, module.objective
