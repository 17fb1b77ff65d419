"""Real runs with a store of features learn what runs without one learn, character for character."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

SMALL = (
    *_runs.TINY_ANSWERER, "trainer.max_steps=8", "trainer.global_batch=80", "data.template=plain",
    "data.augment.scale=null", "checkpoint.every_steps=3", "optim=adamw_connector", "trainer.micro_batch=20",
)  # fmt: skip
NO_WEIGHTS = """
import sys
from vlm_train.models import feature_store
feature_store.weights_digest = lambda tower: b""
from vlm_train.cli import train
sys.exit(train.main(sys.argv[1:]))
"""


def words(scenes: Path, run: Path, *extra: str) -> list[str]:
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    return ["train", *SMALL, *shards, f"run.dir={run}", *extra]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A run without a store."""
    run = tmp_path_factory.mktemp("without") / "run"
    _runs.call(run.parent, words(scenes, run))
    return run


def told(output: str) -> tuple[int, int]:
    """Pictures read and computed."""
    (line,) = (line for line in output.splitlines() if "were read from the feature store" in line)
    numbers = [int(word) for word in line.split() if word.isdigit()]
    return numbers[0], numbers[1]


@pytest.mark.slow
def test_a_run_with_a_store_is_the_run_without_one(tmp_path: Path, scenes: Path, without: Path) -> None:
    """Killed, gone on with, and again over a full store; and with other weights in the same store."""
    store = f"strategy.feature_store={tmp_path / 'store'}"
    _runs.kill_after(tmp_path, words(scenes, tmp_path / "killed", store), tmp_path / "killed", 4)
    _runs.call(tmp_path, words(scenes, tmp_path / "killed"))  # the config without it is the same config
    filled = told(_runs.call(tmp_path, words(scenes, tmp_path / "filled", store)))
    again = told(_runs.call(tmp_path, words(scenes, tmp_path / "again", store)))
    assert filled[0] > 0 and again == (8 * 80, 0)
    for name in ("killed", "filled", "again"):
        assert _runs.learned(tmp_path / name) == _runs.learned(without)


def call_without_weights(folder: Path, arguments: Sequence[str]) -> str:
    command = [sys.executable, "-c", NO_WEIGHTS, *arguments[1:]]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=300, check=True)
    return done.stderr


@pytest.mark.slow
def test_other_weights_read_nothing_of_these(tmp_path: Path, scenes: Path, without: Path) -> None:
    """The twin: a store that is named without the weights."""
    other = ("seed=1", "trainer.max_steps=2")
    _runs.call(tmp_path, words(scenes, tmp_path / "other", *other))
    expected = _runs.learned(tmp_path / "other")
    for name, call in {"named": _runs.call, "nameless": call_without_weights}.items():
        store = f"strategy.feature_store={tmp_path / name}"
        call(tmp_path, words(scenes, tmp_path / f"{name}-one", store))
        assert _runs.learned(tmp_path / f"{name}-one") == _runs.learned(without)
        num_read, _ = told(call(tmp_path, words(scenes, tmp_path / f"{name}-other", store, *other)))
        assert (num_read > 0) == (name == "nameless")
        assert (_runs.learned(tmp_path / f"{name}-other") == expected) == (name == "named")


@pytest.mark.slow
def test_ranks_that_share_the_weights_share_a_store(tmp_path: Path, scenes: Path) -> None:
    machine = ("trainer.devices=2", "strategy=fsdp2", "trainer.max_steps=5")
    _runs.call(tmp_path, words(scenes, tmp_path / "without", *machine))
    for name in ("filled", "again"):
        output = _runs.call(
            tmp_path, words(scenes, tmp_path / name, *machine, f"strategy.feature_store={tmp_path / 'store'}")
        )
        assert _runs.learned(tmp_path / name) == _runs.learned(tmp_path / "without")
        assert (told(output)[1] == 0) == (name == "again")
    assert len({path.parent for path in (tmp_path / "store").rglob("*.index")}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "reason"),
    [(("data.augment.flip=0.5",), "data.augment"), (("optim=adamw",), "the image tower learns"),
     (("data.augment.scale=[0.9,1.0]",), "data.augment")],
)  # fmt: skip
def test_what_no_store_can_serve_trains_without_it_and_says_so(
    tmp_path: Path, scenes: Path, extra: tuple[str, ...], reason: str
) -> None:
    store = f"strategy.feature_store={tmp_path / 'store'}"
    output = _runs.call(tmp_path, words(scenes, tmp_path / "run", *extra, store, "trainer.max_steps=1"))
    (line,) = (line for line in output.splitlines() if "strategy.feature_store is not used: " in line)
    assert reason in line
    assert not (tmp_path / "store").exists()
