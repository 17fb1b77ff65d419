"""Hard captions and partners by content in real runs: the same losses on one process, on two, in micro-batches."""

from __future__ import annotations

from pathlib import Path

import _runs
import pytest

MACHINES = {
    "one": (),
    "two": ("trainer.devices=2", "strategy=ddp"),
    "micro": ("trainer.micro_batch=70", "objective.implementation=tiled"),
}
# more than an epoch, so that a batch holds some images twice
LARGE = ("trainer.global_batch=240", "data.epoch_end=wrap", "trainer.max_steps=4")


def losses(folder: Path, data: Path, *extra: str) -> list[float]:
    run = folder / "-".join(["run", *extra]).replace("/", "_")[:200]
    common = (*LARGE, "schedule.warmup_steps=1", "checkpoint.every_steps=1000", "precision=fp64", "evaluation=none")
    _runs.call(folder, _runs.train_words(data, *common, f"run.dir={run}", *extra))
    return _runs.losses(run)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data.hard_captions=2", "objective.partners=content"])
def test_the_machine_does_not_change_what_is_learned(tmp_path: Path, scenes: Path, what: str) -> None:
    found = {name: losses(tmp_path, scenes, what, *words) for name, words in MACHINES.items()}
    assert found["two"] == pytest.approx(found["one"], abs=1e-12)
    assert found["micro"] == pytest.approx(found["one"], abs=1e-12)
    plain = losses(tmp_path, scenes)  # the twin: neither
    assert max(abs(a - b) for a, b in zip(plain, found["one"], strict=True)) > 1e-3
