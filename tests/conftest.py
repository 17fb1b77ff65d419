"""Shared set-up: no network, one thread a process, the proofs' helpers importable, and one small dataset a session."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# hypothesis imports this module late, and Python 3.11 may fail to parse it deep in a test ("AST constructor recursion
# depth mismatch", cpython issue 106905)
import hypothesis.strategies._internal.regex  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT / "scripts" / "proof"))
# what ranks and runs of tests are copies of: importing takes longer than most of them
multiprocessing.set_forkserver_preload(["vlm_train.training", "vlm_train.cli.main"])


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rendered scenes of 32 pixels as shards, made by the command line."""
    import _runs

    return _runs.make_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real SLURM of one node, which ends with the file of tests; what needs it is skipped where none is installed."""
    import _clusters

    if lack := _clusters.lacks_slurm():
        pytest.skip(lack)
    with _clusters.slurm_cluster(tmp_path_factory.mktemp("slurm") / "daemons", num_cpus=4):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Reports travel from a process of tests to the one that prints, as UTF-8; names of files need not be that."""
    report = yield
    return _as_utf8(report)


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_utf8(key): _as_utf8(item) for key, item in value.items()}
    return type(value)(_as_utf8(item) for item in value) if type(value) in (list, tuple) else value
