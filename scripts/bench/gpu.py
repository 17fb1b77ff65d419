"""Training throughput and model FLOP utilisation: ours beside open_clip's, on one device, in one run; the attention
kernels that the device has beside each other; and on a GPU the tiled losses with and without their fused kernels.

    python scripts/bench/gpu.py               a GPU: CLIP B/16 and L/14 in bf16; without one: a toy in fp32
    python scripts/bench/gpu.py --full        three rounds of four times the length

Each round trains ours and open_clip's in turn, first on one batch that lies on the device (synthetic), then fed from
JPEG files of 20-60 kB (ours from tars, open_clip's as files through its own transform and torch's DataLoader). Ours is
the engine as `vlm-train train` drives it, blocks compiled on a GPU; open_clip's is its model, loss and optimizer as its
trainer puts them together, compiled as a whole. Utilisation counts the same useful FLOPs for both (engine/flops.py).
Rates are medians of steps after the first fifth, with the device waited for. Attention is compared on the batch that
lies on the device: `sdpa`, the default, should lose to none. The losses are those of 16,384 pairs of width 512, forward
and backward, the median of 10.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
from loader import photograph
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
import _runs
from _table import Row, arguments, report

from vlm_train import build, training
from vlm_train.cli.compose import compose_config
from vlm_train.engine.callbacks.recorder import Recorder, StepEnd
from vlm_train.engine.flops import peak_flops, training_flops_per_sample
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError
from vlm_train.objectives import tile_maths, tiled
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.sigmoid import Sigmoid
from vlm_train.types import Batch

ALONE = build.Placement(rank=0, world_size=1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
RATIO_BAR, MFU_BAR = 1.25 if ON_GPU else 1.0, 0.45
KERNELS = ("eager", "flash", "xformers") if ON_GPU else ("eager",)
ATTENTION_BAR = 0.95 if ON_GPU else 0.8  # attention is a small part of a toy, and a processor is never quiet
FUSED_BAR, ERROR_BAR, NUM_PAIRS = 1.5, 1e-4, 16384


@dataclass(frozen=True)
class Case:
    """One architecture: our words, open_clip's, and the batch."""

    name: str
    words: tuple[str, ...]
    theirs: dict[str, Any] | str
    batch: int
    pictures: int


@dataclass
class Rates:
    """Samples a second of each round."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


TOY = Case(
    "toy",
    ("model=clip_tiny", "model.tokenizer.vocab_size=300"),
    {
        "embed_dim": 192,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "patch_size": 8, "head_width": 64},
        "text_cfg": {"context_length": 24, "vocab_size": 300, "width": 192, "heads": 3, "layers": 3},
    },
    batch=32,
    pictures=96,
)
FAST = ("precision=bf16", "compile=blocks")
LARGE = (
    Case("B/16", ("experiment=clip_b16", *FAST), "ViT-B-16", batch=512, pictures=4096),
    Case("L/14", ("experiment=clip_l14", *FAST), "ViT-L-14", batch=128, pictures=2048),
)


def main() -> int:
    options = arguments(__doc__)
    num_rounds, num_steps = (3, 80) if options.full else (1, 20)
    rows: list[Row] = []
    print(f"device: {torch.cuda.get_device_name() if ON_GPU else 'CPU'}, torch {torch.__version__}")
    for case in LARGE if ON_GPU else (TOY,):
        with tempfile.TemporaryDirectory() as folder:
            rows += race(case, Path(folder), num_rounds, num_steps)
    if ON_GPU:
        rows += fused_rows()
    return report(rows, options.json)


def race(case: Case, folder: Path, num_rounds: int, num_steps: int) -> list[Row]:
    write_pictures(folder, case.pictures)
    config = configure(case, folder, num_steps)
    build.prepare(config, RunDirectory(folder / "run"), fresh=True, progress=print)
    parts = build.network(config, build.load_tokenizer(str(folder / "run" / "tokenizer")))
    batch = next(iter(build.train_loader(parts, ALONE)))
    flops = training_flops_per_sample(parts.model, batch["text_ids"].shape[1])
    peak = peak_flops(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)
    rows = []
    for fed in ("synthetic", "JPEG"):
        rates = Rates()
        for number in range(num_rounds):
            source = Repeated(batch, num_steps) if fed == "synthetic" else build.train_loader(parts, ALONE)
            rates.ours.append(ours(config, source, folder / f"{fed}-{number}"))
            rates.theirs.append(theirs(case, batches_of(case, folder, batch, fed), num_steps))
            print(f"{case.name} {fed}: ours {rates.ours[-1]:.1f}, open_clip {rates.theirs[-1]:.1f} images/s")
        ratio = statistics.median(a / b for a, b in zip(rates.ours, rates.theirs, strict=True))
        rows.append(
            Row(claim=f"{case.name}, {fed}: images/s, ours / open_clip", value=ratio, bar=RATIO_BAR, sense=">=")
        )
        if peak:
            mfu, their_mfu = (statistics.median(found) * flops / peak for found in (rates.ours, rates.theirs))
            print(f"{case.name} {fed}: FLOP utilisation {mfu:.3f}, of open_clip {their_mfu:.3f}")
        if peak and ON_GPU:  # a CPU's peak is a measurement beside which a toy's share says little
            rows.append(Row(claim=f"{case.name}, {fed}: FLOP utilisation", value=mfu, bar=MFU_BAR, sense=">="))
    return rows + attention_rows(case, config, batch, folder, num_rounds)


def attention_rows(case: Case, config: Any, batch: Batch, folder: Path, num_rounds: int) -> list[Row]:
    """The default attention kernel beside each other one that runs here."""
    rates: dict[str, list[float]] = {}
    for number, name in product(range(num_rounds), ("sdpa", *KERNELS)):
        config.attention.name = name
        source = Repeated(batch, config.trainer.max_steps)
        try:
            rate = ours(config, source, folder / f"{name}-{number}")
        except ConfigError as error:
            print(f"{case.name}: {error.what}")
            continue
        rates.setdefault(name, []).append(rate)
        print(f"{case.name}, synthetic, attention={name}: {rate:.1f} images/s")
    default = statistics.median(rates.pop("sdpa"))
    return [
        Row(
            claim=f"{case.name}, synthetic: images/s, attention=sdpa / {name}",
            value=default / statistics.median(found),
            bar=ATTENTION_BAR,
            sense=">=",
        )
        for name, found in rates.items()
    ]


def fused_rows() -> list[Row]:
    """Time of the tiled losses by torch / by the fused kernels, and how far their gradients are apart."""
    rows = []
    for kind in (InfoNCE, Sigmoid):
        objective = kind(implementation="tiled").to(DEVICE)
        with mock.patch.object(tiled, "maths_for", lambda x: tile_maths):
            plain_seconds, plain = loss_and_gradient(objective)
        seconds, fused = loss_and_gradient(objective)
        print(f"{kind.__name__}, tiled: {1e3 * plain_seconds:.2f} ms by torch, {1e3 * seconds:.2f} ms fused")
        claim = f"{kind.__name__} in tiles, {NUM_PAIRS} pairs"
        error = float((fused - plain).norm() / plain.norm())
        rows += [
            Row(claim=f"{claim}: time, torch / fused", value=plain_seconds / seconds, bar=FUSED_BAR, sense=">="),
            Row(claim=f"{claim}: gradient, fused - torch", value=error, bar=ERROR_BAR, sense="<="),
        ]
    return rows


def loss_and_gradient(objective: Any) -> tuple[float, torch.Tensor]:
    """(median seconds of a pass forward and backward, the gradient of the images)."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(NUM_PAIRS, 512, generator=generator) for _ in range(2)]
    leaves = [torch.nn.functional.normalize(x, dim=1).to(DEVICE).requires_grad_() for x in features]
    batch = {"image_features": leaves[0], "text_features": leaves[1], "weights": torch.ones(NUM_PAIRS, device=DEVICE)}
    seconds = []
    for _ in range(12):
        leaves[0].grad = leaves[1].grad = None
        torch.cuda.synchronize()
        start = time.perf_counter()
        objective.loss(batch).sum.backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert leaves[0].grad is not None
    return statistics.median(seconds[2:]), leaves[0].grad


def configure(case: Case, folder: Path, num_steps: int) -> Any:
    common = ("data=shards", f"data.train.shards={folder / 'tar'}", f"data.val.shards={folder / 'tar'}",
              f"trainer.max_steps={num_steps}", "schedule.warmup_steps=1", f"trainer.global_batch={case.batch}",
              "data.epoch_end=wrap", f"data.num_workers={os.cpu_count() or 1}", "evaluation=none",
              f"run.dir={folder}/run")  # fmt: skip
    return compose_config([*case.words, *common])


def ours(config: Any, source: Iterable[Batch], path: Path) -> float:
    """Samples a second through the engine."""
    run = RunDirectory(path)
    run.create()
    parts = build.network(config, build.load_tokenizer(f"{config.run.dir}/tokenizer"))
    recorder = Recorder(run=run, global_batch=config.trainer.global_batch, num_steps=config.trainer.max_steps, sinks=[])
    trainer = training.make_trainer(config, [recorder, StepEnd(recorder)])
    trainer.fit(training.training_module(parts, ALONE), train_dataloaders=source)
    rates = [row["samples_per_second"] for row in _runs.rows(path)]
    return statistics.median(rates[len(rates) // 5 + 1 :])


class Repeated:
    """One batch that is on the device already, again and again."""

    def __init__(self, batch: Batch, num_steps: int) -> None:
        self.batch = {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        return (Batch(**{**self.batch, "step": step}) for step in range(self.num_steps))


def theirs(case: Case, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], num_steps: int) -> float:
    """Samples a second of open_clip's model, loss and optimizer."""
    make = open_clip.create_model if isinstance(case.theirs, str) else lambda config: open_clip.CLIP(**config)
    model: Any = make(case.theirs).to(DEVICE).train()
    step_of = torch.compile(model) if ON_GPU else model
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    seconds, end = [], time.perf_counter()
    for _ in range(num_steps):
        images, texts = (part.to(DEVICE, non_blocking=True) for part in next(batches))
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            image, text, scale = step_of(images, texts)[:3]
            loss = loss_of(image, text, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        loss.item()  # waits for the device, as our record of the loss does
        seconds.append(time.perf_counter() - end)
        end = time.perf_counter()
    return case.batch / statistics.median(seconds[len(seconds) // 5 + 1 :])


def batches_of(case: Case, folder: Path, batch: Batch, fed: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(images, texts) for open_clip: one batch on the device for ever, or files through its own transform."""
    size, length = batch["images"].shape[-1], 24 if case is TOY else 77
    text = torch.nn.functional.pad(batch["text_ids"], (0, length))[:, :length]
    if fed == "synthetic":
        images = torch.randn(case.batch, 3, size, size, device=DEVICE)
        while True:
            yield images, text.to(DEVICE)
    transform = open_clip.image_transform(size, is_train=True)
    files = Files(sorted((folder / "files").iterdir()), transform)
    loader = DataLoader(files, case.batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True,
                        pin_memory=ON_GPU, persistent_workers=True)  # fmt: skip
    while True:
        for images in loader:
            yield images, text


class Files(Dataset):
    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image)


def write_pictures(folder: Path, num_pictures: int) -> None:
    """The same JPEGs as a tar and as files."""
    (folder / "files").mkdir()
    (folder / "tar").mkdir()
    with get_context("fork").Pool(os.cpu_count()) as pool, tarfile.open(folder / "tar" / "00000.tar", "w") as tar:
        for number, (_, _, jpeg) in enumerate(pool.imap(photograph, range(num_pictures), chunksize=16)):
            (folder / "files" / f"{number:06d}.jpg").write_bytes(jpeg)
            for suffix, content in (("jpg", jpeg), ("txt", f"picture number {number} of a few".encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    sys.exit(main())
