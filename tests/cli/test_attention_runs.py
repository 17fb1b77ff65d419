"""Real runs whose attention is computed by another kernel from one start to the next."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import _runs
import pytest


def words(data: Path, run: Path, *extra: str) -> list[str]:
    return _runs.train_words(data, "trainer.max_steps=8", "checkpoint.every_steps=3", f"run.dir={run}", *extra)


def kernels(run: Path) -> list[str]:
    """What computed the attention of the texts, at each start of the run."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["attention"]["text"] for event in events if event["event"] == "environment"]


@pytest.mark.slow
def test_a_run_goes_on_with_another_attention_kernel(tmp_path: Path, scenes: Path) -> None:
    """With a moving average, and activations that are computed again."""
    extra = ("optim.ema_decay=0.9", "strategy.recompute=true", "evaluation=none")
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    _runs.call(tmp_path, words(scenes, whole, *extra))
    _runs.kill_after(tmp_path, words(scenes, changed, *extra, "attention=flash"), changed, 4)
    _runs.call(tmp_path, words(scenes, changed, *extra, "attention=eager"))
    assert kernels(whole) == ["sdpa"] and kernels(changed) == ["flash; sdpa where masked", "eager"]
    losses = _runs.losses(changed)
    assert losses == pytest.approx(_runs.losses(whole), abs=1e-5)  # the rounding of fp32 over a few steps
    assert losses[3:] != _runs.losses(whole)[3:]  # other kernels round otherwise: eager was used


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_a_kernel_that_is_not_there_is_refused_before_there_is_a_run(tmp_path: Path, scenes: Path) -> None:
    printed = _runs.call(tmp_path, words(scenes, tmp_path / "run", "attention=xformers"), expect=2)
    assert "the package xformers is not installed" in printed and "pip install xformers" in printed
    assert "Traceback" not in printed and not (tmp_path / "run").exists()
