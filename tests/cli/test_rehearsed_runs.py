"""`trainer.micro_batch=auto` in real runs: what it finds where memory is short, and that it changes nothing else."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path
from typing import Any

import _runs
import pytest

AUTO = "trainer.micro_batch=auto"


def words(data: Path, run: Path, *extra: str) -> list[str]:
    common = ("trainer.max_steps=8", "checkpoint.every_steps=3", "evaluation=none", f"run.dir={run}")
    return _runs.train_words(data, *common, *extra)


def answers(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == "micro_batch"]


@pytest.mark.slow
def test_a_run_learns_what_one_with_the_same_micro_batch_learns_and_asks_once(tmp_path: Path, scenes: Path) -> None:
    """Bit for bit, killed and resumed. tests/engine/test_rehearsal.py has the twin whose rehearsal leaves traces."""
    auto, given = tmp_path / "auto", tmp_path / "given"
    command = words(scenes, auto, AUTO, "checkpoint.asynchronous=false")
    _runs.kill_after(tmp_path, command, auto, 4)
    output = _runs.call(tmp_path, command)
    (answer,) = answers(auto)
    assert (answer["micro_batch"], answer["tried"]) == (24, {"24": True})
    assert "resuming" in output and "trainer.micro_batch=auto:" not in output
    _runs.call(tmp_path, words(scenes, given, f"trainer.micro_batch={answer['micro_batch']}"))
    assert _runs.learned(auto) == _runs.learned(given)
    assert "micro_batch: auto" in (auto / "config.yaml").read_text()
    assert "24 of 24 samples of a rank at once" in (auto / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_rehearse_alone_whatever_the_strategy_exchanges(tmp_path: Path, scenes: Path, strategy: str) -> None:
    run = tmp_path / "run"
    _runs.call(tmp_path, words(scenes, run, AUTO, "trainer.devices=2", f"strategy={strategy}",
                               "objective.implementation=tiled"))  # fmt: skip
    (answer,) = answers(run)
    assert (answer["micro_batch"], answer["ranks"]) == (12, 2)


# A step of 32 samples takes 0.9 GB more than a process of ours has, which is about 2.1 GB of data where it trains and
# 1.0 GB where it rehearses (measured): of 2.7 GB a third of these samples fits.
LARGE = (
    "trainer.global_batch=32", "model.vision.image.size=128", "model.vision.patch_size=4", "model.vision.num_layers=2",
    "attention=eager", "data.num_workers=0", "trainer.max_steps=2", "schedule.warmup_steps=1",
)  # fmt: skip
GIGABYTES = 2.7


def limited(tmp_path: Path, command: list[str]) -> tuple[int, str]:
    """(exit code, output) of a command that may have GIGABYTES."""
    bound = int(GIGABYTES * 2**30)
    process = _runs.start(tmp_path, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (bound, bound)))  # fmt: skip
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


@pytest.mark.slow
def test_where_memory_is_short_a_run_takes_what_fits(tmp_path: Path, scenes: Path) -> None:
    """The twin runs its whole share, and has no memory for it."""
    auto, given, twin = (tmp_path / name for name in ("auto", "given", "twin"))
    code, output = limited(tmp_path, words(scenes, auto, *LARGE, AUTO))
    assert code == 0, output
    (answer,) = answers(auto)
    assert 1 <= answer["micro_batch"] < 32 and answer["tried"]["32"] is False
    code, output = limited(tmp_path, words(scenes, twin, *LARGE))
    assert code == 1 and "can't allocate memory" in output
    _runs.call(tmp_path, words(scenes, given, *LARGE, f"trainer.micro_batch={answer['micro_batch']}"))
    assert _runs.learned(auto) == _runs.learned(given)


def test_what_bounds_micro_batches_otherwise_is_refused(tmp_path: Path) -> None:
    start = ["train", *_runs.TINY_ANSWERER, AUTO]
    output = _runs.call(tmp_path, [*start, "trainer.micro_tokens=4096"], expect=2)
    assert "trainer.micro_tokens=4096" in output and "leave out" in output
    assert "out of range" in _runs.call(tmp_path, [*start[:-1], "trainer.micro_batch=most"], expect=2)
