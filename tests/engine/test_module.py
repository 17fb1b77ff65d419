"""What the LightningModule does to a batch before a step, in a real Trainer."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.module import TrainingModule, Transforms
from vlm_train.engine.optim import AdamW
from vlm_train.engine.schedule import Cosine
from vlm_train.engine.steps import StepPlan
from vlm_train.engine.trainer import lightning_trainer
from vlm_train.imaging import recolour
from vlm_train.models.attention import eager, sdpa
from vlm_train.models.layers import Attention
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.types import Batch


class Seeing(nn.Module):
    """Keeps the batches that it was shown."""

    outputs = frozenset({"image_features", "text_features"})

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = nn.Linear(3 * 4 * 4, 4), nn.Linear(5, 4)
        self.seen: list[Batch] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.seen.append(batch)
        image = self.vision(batch["images"].float().flatten(1))
        return {
            "image_features": nn.functional.normalize(image, dim=-1),
            "text_features": nn.functional.normalize(self.text(batch["text_ids"].float()), dim=-1),
        }


def make_batch(step: int, finish: Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (6, 3, 4, 4), generator=generator, dtype=torch.uint8)
    texts = torch.randint(0, 9, (6, 5), generator=generator)
    batch = Batch(images=images, text_ids=texts, weights=torch.ones(6), step=step)
    return batch if finish is None else Batch(**batch, finish=finish)


def untrained(model: nn.Module, **options: Any) -> TrainingModule:
    return TrainingModule(
        model=model,
        objective=InfoNCE(),
        optim=AdamW(
            lr=1e-3, weight_decay=0.1, groups=[{"pattern": ".*", "lr": 1e-3, "weight_decay": 0.1}], ema_decay=0.9
        ),
        schedule=Cosine(total_steps=2, warmup_steps=0),
        plan=StepPlan(global_batch=6, budgets=Budgets(samples=6), rank=0, world_size=1, seed=0),
        **options,
    )


def trained(
    model: nn.Module, finish: Tensor | None = None, callbacks: Sequence[lightning.Callback] = (), **options: Any
) -> TrainingModule:
    """Two steps."""
    module = untrained(model, **options)
    trainer: Any = lightning_trainer(
        accelerator="cpu", devices=1, num_nodes=1, strategy="single", precision="fp32", callbacks=list(callbacks)
    )
    batches: Any = [make_batch(step, finish) for step in range(2)]
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return module


def seen_by_the_model(finish: Tensor | None) -> list[Batch]:
    model = Seeing()
    trained(model, finish)
    return model.seen


def test_colours_that_were_left_to_the_trainer_are_finished_before_the_model_sees_them() -> None:
    finish = torch.linspace(0.5, 1.5, 18).reshape(6, 3)
    seen = seen_by_the_model(finish)
    assert len(seen) == 2
    for step, batch in enumerate(seen):
        raw = make_batch(step, None)["images"]
        assert "finish" not in batch and torch.equal(batch["images"], recolour(raw, finish))
        assert not torch.equal(batch["images"], raw)


def test_a_batch_without_colours_to_finish_is_not_touched() -> None:
    for step, batch in enumerate(seen_by_the_model(None)):
        assert torch.equal(batch["images"], make_batch(step, None)["images"])


class Attending(Seeing):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(width=4, num_heads=1, depth=1)


def test_the_kernel_of_attention_is_chosen_for_the_moving_average_too() -> None:
    module = trained(Attending(), transforms=Transforms(attention="eager"))
    assert module.averaged_model is not None
    for model in (module.model, module.averaged_model):
        assert model.attention.attend is eager
    assert trained(Attending()).model.attention.attend is sdpa


class Listening(lightning.Callback):
    """Keeps who has SIGTERM when training starts."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)


def test_signals_are_left_to_us() -> None:
    """From before the trainer to its first step; the twin: Lightning's own trainer takes SIGTERM."""
    ours, before = lambda *_: None, signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, ours)
    try:
        listening = Listening()
        trained(Seeing(), callbacks=[listening])
        assert listening.handler is ours
        plain = lightning.Trainer(max_steps=1, logger=False, enable_checkpointing=False, callbacks=[listening],
                                  accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        plain.fit(untrained(Seeing()), train_dataloaders=DataLoader([make_batch(0, None)], batch_size=None))
        assert listening.handler is not ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_colours_are_finished_on_the_device_of_the_batch() -> None:
    batch = {name: value.cuda() for name, value in make_batch(0, torch.ones(6, 3)).items() if name != "step"}
    images = batch["images"].clone()
    finished: Any = TrainingModule.on_after_batch_transfer(None, batch, 0)  # type: ignore[arg-type]
    assert finished["images"].is_cuda and torch.equal(finished["images"], images)
