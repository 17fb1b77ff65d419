"""FLOP utilisation: how long the texts are that count, and a peak that was measured while others used the cores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlm_train.engine.callbacks import recorder
from vlm_train.engine.flops import num_tokens
from vlm_train.engine.rundir import RunDirectory
from vlm_train.types import Batch


def test_a_peak_that_was_too_low_is_measured_again_after_a_new_record_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [10.0, 16.0, 40.0]
    monkeypatch.setattr(recorder, "peak_flops", lambda device, dtype: measured.pop(0))
    trainer, module = SimpleNamespace(precision="32-true", world_size=2), SimpleNamespace(device=torch.device("cpu"))
    record = recorder.Recorder(run=RunDirectory(tmp_path), global_batch=4, num_steps=4, sinks=[])
    record.on_train_start(trainer, module)  # type: ignore[arg-type]

    def share(flops: float) -> float | None:
        return record._utilisation(flops, trainer, module.device)  # type: ignore[arg-type]

    assert share(15.0) == 0.75 and len(measured) == 2  # of two ranks
    assert share(33.0) == 1.0 and len(measured) == 1  # still busy: what was reached is the peak
    assert share(33.0) == 1.0 and len(measured) == 1  # no record, no measurement
    assert share(40.0) == 0.5 and measured == []


def test_a_text_counts_with_its_padding_and_a_dialogue_without() -> None:
    texts = Batch(text_ids=torch.zeros(3, 16, dtype=torch.int64))
    assert num_tokens(texts) == 16
    lengths = torch.tensor([3, 40, 8, 10])
    dialogues = Batch(**texts, dialogue_ids=torch.zeros(4, 40, dtype=torch.int64), dialogue_lengths=lengths)
    assert num_tokens(dialogues) == 15  # the mean, 15.25; 40 would count padding
