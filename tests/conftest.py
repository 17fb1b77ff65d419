"""Shared set-up: no network, one thread a process, the proofs' helpers importable, and one small dataset a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT / "scripts" / "proof"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rendered scenes of 32 pixels as shards, made by the command line."""
    import _runs

    return _runs.make_scenes(tmp_path_factory.mktemp("data"))
