"""What the framework costs: training through `vlm-train`'s engine against a bare PyTorch loop.

    python scripts/bench/overhead.py               5 pairs of 12 steps
    python scripts/bench/overhead.py --full        15 pairs of 30 steps

Both sides have the same model and weights, loss, optimizer, batch, thread count and data loader, and run in turn in one
process. The bare loop is what one would write by hand: forward, cross-entropy both ways, backward, clip, step, one
`loss.item()`. Ours adds Lightning, exact counts, keyed randomness, metrics.jsonl and signal handling.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
import _runs
from _table import Row, arguments, report

from vlm_train import build, training
from vlm_train.cli.compose import compose_config
from vlm_train.engine.ledger import Ledger
from vlm_train.engine.rundir import RunDirectory

ALONE = build.Placement(rank=0, world_size=1)


def main() -> int:
    options = arguments(__doc__)
    num_pairs, num_steps = (15, 30) if options.full else (5, 12)
    with tempfile.TemporaryDirectory() as folder:
        data = _runs.make_scenes(Path(folder), num_samples=1200)
        words = ["experiment=quickstart", f"trainer.max_steps={num_steps}", "schedule.warmup_steps=2", "data=shards",
                 f"data.train.shards={data / 'train'}", f"data.val.shards={data / 'val'}", "evaluation=none",
                 "data.num_workers=0", f"run.dir={folder}/run", f"checkpoint.every_steps={10**6}"]  # fmt: skip
        config = compose_config(words)
        build.prepare(config, make_run(Path(folder) / "run"), fresh=True, progress=lambda line: None)
        pairs = []
        for number in range(num_pairs):
            pairs.append((ours(config, Path(folder) / f"run-{number}", folder), bare(config, folder)))
            print(
                f"pair {number + 1}: engine {pairs[-1][0] * 1e3:.1f} ms a step, bare loop {pairs[-1][1] * 1e3:.1f} ms"
            )
    ratio = statistics.median(engine / loop for engine, loop in pairs)
    return report([Row(claim="time of a step, engine / bare loop", value=ratio, bar=1.03, sense="<=")], options.json)


def make_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.create()
    return run


def ours(config, path: Path, folder: str) -> float:
    """Median seconds a step through the engine, as metrics.jsonl tells it."""
    parts = build.network(config, build.load_tokenizer(f"{folder}/run/tokenizer"))
    suite = build.evaluation_suite(parts, ALONE)
    loader = build.train_loader(parts, ALONE)
    trainer = training.make_trainer(config, training.callbacks(parts, make_run(path), loader, suite, [], Ledger()))
    trainer.fit(training.training_module(parts, ALONE), train_dataloaders=loader)
    return statistics.median(row["samples"] / row["step"] / row["samples_per_second"] for row in _runs.rows(path)[2:-1])


def bare(config, folder: str) -> float:
    """Median seconds a step of a hand-written loop."""
    parts = build.network(config, build.load_tokenizer(f"{folder}/run/tokenizer"))
    model, objective = parts.model.train(), parts.objective
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True)
    seconds, end = [], time.perf_counter()
    for batch in build.train_loader(parts, ALONE):
        optimizer.zero_grad()
        features = model(batch)
        logits = objective.logit_scale.exp() * features["image_features"] @ features["text_features"].T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - end)
        end = time.perf_counter()
    return statistics.median(seconds[2:-1])


if __name__ == "__main__":
    sys.exit(main())
