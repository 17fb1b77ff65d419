"""Proof: our step is open_clip's step. The same tiny CLIP from the same weights over the same batches.

    python scripts/proof/against_open_clip.py [--full] [--json FILE]         # CPU, about a minute

open_clip 3.3.0 trains by its own `train_one_epoch`, with its model, ClipLoss, parameter groups and cosine schedule;
ours by the TrainingModule in a Lightning Trainer. Compared is the loss of each step: 100 steps in fp64, also in
micro-batches on our side, and the first 20 in fp32 (rounding grows with the steps). Controls: decay on biases and norms
too, which is open_clip's rule forgotten, and its own accumulation (`--accum-freq 2`), whose temperature gradient is
doubled.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning
import open_clip.loss
import torch
from _table import Row, arguments, report
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.utils.data import DataLoader

from vlm_train.engine.micro_batches import Budgets
from vlm_train.engine.module import TrainingModule
from vlm_train.engine.optim import AdamW
from vlm_train.engine.schedule import Cosine
from vlm_train.engine.steps import StepPlan
from vlm_train.engine.trainer import lightning_trainer, set_up_torch
from vlm_train.export.weights import export_state
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.types import Batch, TextSpec

BATCH, LENGTH, WARMUP, LR, DECAY, CLIP_NORM = 24, 16, 10, 1e-3, 0.2, 1.0
SPEC = TextSpec(vocab_size=64, context_length=LENGTH, pad_id=0, bos_id=62, eos_id=63)
BETAS, EPS = (0.9, 0.98), 1e-6


def make_model() -> DualEncoder:
    """CLIP with both towers cut down; equal on every call."""
    torch.manual_seed(0)
    vision = VisionTransformer(
        image={"size": 32}, patch_size=8, width=32, num_layers=2, num_heads=2, activation="quick_gelu"
    )
    text = TextTransformer(spec=SPEC, width=32, num_layers=2, num_heads=2, activation="quick_gelu")
    return DualEncoder(vision=vision, text=text, embed_dim=24)


def batches(num_steps: int) -> Iterator[Batch]:
    """Pictures and texts that have something to do with each other, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        ids = torch.randint(1, 60, (BATCH, LENGTH), generator=generator)
        ids[:, 0], ids[:, -1] = SPEC.bos_id, SPEC.eos_id
        shade = (ids[:, 1:4] * 4)[:, :, None, None]
        noise = torch.randint(0, 16, (BATCH, 3, 32, 32), generator=generator)
        images = (shade + noise).clamp(max=255).to(torch.uint8)
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        yield Batch(images=images, text_ids=ids, text_mask=mask, weights=torch.ones(BATCH), step=step)


def ours(
    precision: str, num_steps: int, micro_batch: int | None = None, *, decay_everything: bool = False
) -> list[float]:
    """Losses of our trainer."""
    groups = [{"pattern": ".*", "lr": LR, "weight_decay": DECAY}]
    optim = AdamW(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, grad_clip=CLIP_NORM, groups=groups)
    module = TrainingModule(
        model=make_model(),
        objective=InfoNCE(),
        optim=optim,
        schedule=Cosine(warmup_steps=WARMUP, total_steps=num_steps),
        plan=StepPlan(global_batch=BATCH, budgets=Budgets(samples=micro_batch), rank=0, world_size=1, seed=0),
    )
    found: list[float] = []

    class Watch(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if decay_everything:
                for group in trainer.optimizers[0].param_groups:
                    group["weight_decay"] = DECAY

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            found.append(outputs["row"]["loss"])

    trainer = lightning_trainer(
        accelerator="cpu", devices=1, num_nodes=1, strategy="single", precision=precision, callbacks=[Watch()]
    )
    trainer.fit(module, train_dataloaders=DataLoader(list(batches(num_steps)), batch_size=None))
    return found


def theirs(precision: str, num_steps: int, accum_freq: int = 1) -> list[float]:
    """Losses of open_clip's trainer; with accumulation each batch goes in as `accum_freq` parts."""
    mine = make_model()
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = CLIP(
        24,
        CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
        CLIPTextCfg(context_length=LENGTH, vocab_size=SPEC.vocab_size, width=32, heads=2, layers=2),
        quick_gelu=True,
        output_dict=True,
    )
    model.load_state_dict(export_state(mine, family="open_clip", logit_scale=InfoNCE().logit_scale.data))
    model.to(dtype)
    decayed, bare = [], []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        (bare if exempt else decayed).append(parameter)
    groups = [{"params": bare, "weight_decay": 0.0}, {"params": decayed, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    found: list[float] = []
    inner = open_clip.loss.ClipLoss()

    def loss(**outputs: Any) -> Any:
        result = inner(**outputs)
        found.append(float(sum(result.values())))
        return result

    pairs: list[tuple[Tensor, Tensor]] = []
    mine.to(dtype)
    for batch in batches(num_steps):
        images, ids = mine.normalize(batch["images"]), batch["text_ids"]
        pairs += list(zip(images.chunk(accum_freq), ids.chunk(accum_freq), strict=True))
    loader = Loader(pairs)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    settings = Namespace(
        device="cpu", precision="fp64" if precision == "fp64" else "fp32", distill=False, accum_freq=accum_freq,
        skip_scheduler=False, horovod=False, grad_clip_norm=CLIP_NORM, rank=0, local_rank=0, world_size=1,
        log_every_n_steps=10**9, batch_size=BATCH, wandb=False, log_local=False, distributed=False,
    )  # fmt: skip
    schedule = cosine_lr(optimizer, LR, WARMUP, num_steps)
    train_one_epoch(model, data, loss, 0, optimizer, None, schedule, None, settings)
    return found[::accum_freq]


class Loader(list[tuple[Tensor, Tensor]]):
    """Batches with the counts that open_clip's loop asks for."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(ids) for _, ids in self)


def largest(first: list[float], second: list[float]) -> float:
    """Largest difference of a loss; both must be as long."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    set_up_torch(accelerator="cpu", deterministic=True, num_threads=1)
    num_steps = 200 if options.full else 100
    wide = theirs("fp64", num_steps)
    accumulated = largest(theirs("fp64", num_steps, accum_freq=2), wide)
    rows = [
        Row(
            claim=f"{num_steps} steps in fp64 [control: decay on biases and norms]",
            value=largest(ours("fp64", num_steps), wide),
            bar=1e-6,
            sense="<=",
            control=largest(ours("fp64", num_steps, decay_everything=True), wide),
        ),
        Row(
            claim=f"{num_steps} steps in fp64, ours in 2 micro-batches [control: open_clip --accum-freq 2]",
            value=largest(ours("fp64", num_steps, micro_batch=BATCH // 2), wide),
            bar=1e-6,
            sense="<=",
            control=accumulated,
        ),
        Row(
            claim="20 steps in fp32 [control: decay on biases and norms]",
            value=largest(ours("fp32", 20), theirs("fp32", 20)),
            bar=1e-5,
            sense="<=",
            control=largest(ours("fp32", 20, decay_everything=True), theirs("fp32", 20)),
        ),
    ]
    return report(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
