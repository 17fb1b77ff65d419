"""What a stage says is frozen stays as it was bit by bit, and what it says learns does: by real steps of the engine."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._composable import checkpoint
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from generative_toys import SPEC, TEXT, make_batch, make_model

from vlm_train.engine import module as engine
from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.module import TrainingModule, Transforms
from vlm_train.engine.optim import AdamW
from vlm_train.engine.schedule import Cosine
from vlm_train.engine.steps import StepPlan
from vlm_train.engine.trainer import lightning_trainer
from vlm_train.errors import ConfigError
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.objectives.next_token import NextToken
from vlm_train.types import Batch

LORA = {"rank": 4, "alpha": 8, "dropout": 0.3}
REST = {"pattern": ".*", "lr": 1e-2, "weight_decay": 0.1}
FROZEN_TOWER = {"pattern": r"model\.vision\..*", "frozen": True}
ALIGN = [{"pattern": r"model\.(vision|text)\..*", "frozen": True}, REST]
STAGES: dict[str, tuple[list[dict[str, Any]], Any, tuple[str, ...]]] = {  # groups, adapters, beginnings of what learns
    "align": (ALIGN, None, ("connector.",)),
    "instruct": ([FROZEN_TOWER, REST], None, ("connector.", "text.")),
    "adapters": ([FROZEN_TOWER, REST], LORA, ("connector.", "text.network.model.layers.*.lora_")),
    "adapters alone": ([{"pattern": r"model\.(vision|connector)\..*", "frozen": True}, REST], LORA,
                       ("text.network.model.layers.*.lora_",)),
    "quantised": ([FROZEN_TOWER, REST], {**LORA, "quantize": "nf4"},
                  ("connector.", "text.network.model.layers.*.lora_")),
}  # fmt: skip


def make(lora: Any = None) -> GenerativeModel:
    torch.manual_seed(0)
    text = CausalLanguageModel(spec=SPEC, architecture={"model_type": "llama", **TEXT}, lora=lora)
    return make_model(text=text, feature_layer=-2)


def steps(num_steps: int) -> list[Batch]:
    batch = make_batch()
    return [Batch(**batch, weights=torch.ones(len(batch["num_images"])), step=step) for step in range(num_steps)]  # type: ignore[typeddict-item]


def module_of(model: GenerativeModel, groups: list[dict[str, Any]], **options: Any) -> TrainingModule:
    return TrainingModule(
        model=model,
        objective=NextToken(),
        optim=AdamW(lr=1e-2, weight_decay=0.1, groups=groups, **options.pop("optim", {})),
        schedule=Cosine(total_steps=4, warmup_steps=0),
        plan=StepPlan(global_batch=5, budgets=Budgets(samples=2), rank=0, world_size=1, seed=0),
        transforms=Transforms(**options),
    )


def trained(module: TrainingModule, num_steps: int = 3) -> TrainingModule:
    trainer: Any = lightning_trainer(
        accelerator="cpu", devices=1, num_nodes=1, strategy="single", precision="fp32", callbacks=[]
    )
    trainer.fit(module, train_dataloaders=DataLoader(steps(num_steps), batch_size=None))  # type: ignore[arg-type]
    return module


def is_of(name: str, beginnings: tuple[str, ...]) -> bool:
    return any(name.startswith(first) and all(part in name for part in rest)
               for first, *rest in (beginning.split("*") for beginning in beginnings))  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_frozen_stays_and_what_learns_moves(stage: str, recompute: bool) -> None:
    """With weight decay and a moving average, which must not touch what is frozen either."""
    groups, lora, learning = STAGES[stage]
    model = make(lora)
    before = copy.deepcopy(model.state_dict())
    module = trained(module_of(model, groups, recompute=recompute, optim={"ema_decay": 0.9}))
    names = [name for name, _ in model.named_parameters()]
    moved = {name for name in names if not torch.equal(before[name], model.state_dict()[name])}
    assert moved == {name for name in names if is_of(name, learning)}
    averaged = module.averaged_model.state_dict()  # type: ignore[union-attr]
    assert {name for name in names if not torch.equal(before[name], averaged[name])} == moved
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items() if name not in names)  # buffers
    owned = [id(parameter) for group in module.optimizers().param_groups for parameter in group["params"]]  # type: ignore[union-attr]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(parameter) for name, parameter in model.named_parameters() if name in moved}
    for other, (_, twin_lora, twin) in STAGES.items():  # what another stage expects is told apart from this
        if other != stage and twin_lora == lora:
            assert moved != {name for name in names if is_of(name, twin)}


def gradients(model: GenerativeModel, **options: Any) -> dict[str, Tensor]:
    """Of the connector and of adapters, after one step's backward passes."""
    module = module_of(model, ALIGN if not hasattr(model.text, "lora_scale") else [FROZEN_TOWER, REST], **options)
    found: dict[str, Tensor] = {}

    class Keeping(type(module)):  # type: ignore[misc]
        def _clip(self, optimizer: Any) -> Tensor:
            learning = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            found.update({name: p.grad.clone() for name, p in learning.items() if p.grad is not None})
            return super()._clip(optimizer)

    module.__class__ = Keeping
    trained(module, num_steps=1)
    return found


def test_a_gradient_reaches_the_connector_through_a_frozen_language_model_that_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal to the last bit. The twin: a frozen language model that runs without a graph, as frozen towers do."""
    kept, again = gradients(make()), gradients(make(), recompute=True)
    assert kept.keys() == again.keys() and len(kept) == 4
    assert all(torch.equal(kept[name], again[name]) and kept[name].any() for name in kept)
    without = torch.no_grad()(CausalLanguageModel.forward)
    monkeypatch.setattr(CausalLanguageModel, "forward", without)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients(make(), recompute=True)


def test_what_adapters_drop_out_is_drawn_again_when_they_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the last bit. The twin: blocks that are computed again with other noise."""
    kept, again = gradients(make(LORA)), gradients(make(LORA), recompute=True)
    assert kept.keys() == again.keys() and len(kept) == 4 + 28
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    monkeypatch.setattr(engine, "checkpoint", lambda block: checkpoint(block, preserve_rng_state=False))
    twin = gradients(make(LORA), recompute=True)
    assert any((kept[name] - twin[name]).abs().max() > 1e-3 for name in kept)


@pytest.mark.parametrize("pattern", [r"model\.text\..*embed_tokens.*", r"model\.text\..*base_layer.*"])
def test_groups_cannot_teach_what_adapters_stand_beside(pattern: str) -> None:
    groups = [{"pattern": pattern, "lr": 1e-3}, FROZEN_TOWER, REST]
    with pytest.raises(ConfigError, match="cannot learn"):
        module_of(make(LORA), groups)
    groups[0] = {"pattern": pattern, "frozen": True}  # says what is so anyway
    module_of(make(LORA), groups)
    both = [{"pattern": r"model\.text\..*", "lr": 1e-3}, FROZEN_TOWER, REST]  # adapters at a rate of their own
    trained(module_of(make(LORA), both), num_steps=1)
    if "embed" in pattern:
        module_of(
            make(), [{"pattern": pattern, "lr": 1e-3}, FROZEN_TOWER, REST]
        )  # the twin: without adapters it learns


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_tower_that_is_frozen_is_in_evaluation_mode_and_adapters_are_not(lora: Any) -> None:
    model = make(lora)
    module = module_of(model, ALIGN if lora is None else [FROZEN_TOWER, REST])
    module.train()
    assert model.text.network.training == (lora is not None)
    assert not any(p.requires_grad for p in model.vision.parameters())
