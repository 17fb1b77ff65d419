"""A real offline W&B run: the rows that were written are the rows that W&B holds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import wandb

from vlm_train.engine.wandb import WandbSink
from vlm_train.errors import ConfigError


def test_offline_rows_are_in_the_run_file(tmp_path: Path) -> None:
    sink = WandbSink(
        project="p", entity=None, mode="offline", run_id="run-1", directory=tmp_path, config={"optim": {"lr": 0.25}}
    )
    for step in (1, 2):
        sink({"step": step, "loss": 0.5 / step, "marker": f"row-{step}"})
    sink.close()
    files = list(tmp_path.glob("wandb/offline-run-*/run-run-1.wandb"))
    assert len(files) == 1
    deadline = time.monotonic() + 20
    while b"row-2" not in (content := files[0].read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)  # the file is written by a process of W&B's own, which may be behind
    assert b"row-1" in content and b"row-2" in content and b"row-3" not in content


def test_online_without_a_login_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no terminal to ask for one, and a server that cannot be reached."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    wandb.teardown()  # it reads the environment once a process
    with pytest.raises(ConfigError, match="Weights & Biases did not start") as caught:
        WandbSink(project="p", entity=None, mode="online", run_id="run-2", directory=tmp_path, config={})
    assert "logger.mode=offline" in str(caught.value)
