"""Real runs that meet a spike: taken back, killed, resumed, on one rank and several, by strategies of every kind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _runs
import pytest
import torch

from vlm_train.cli import main as command_line
from vlm_train.data.steps import TrainSteps
from vlm_train.engine import rewinds
from vlm_train.engine.callbacks import recorder
from vlm_train.engine.rundir import RunDirectory, append_line

BAD_BATCH, NUM_STEPS = 7, 16
POISON = f"""
import torch
from vlm_train.data.steps import TrainSteps

honest = TrainSteps.batch


def batch(self, step):
    made = honest(self, step)
    if step == {BAD_BATCH}:
        made["images"] = torch.full(made["images"].shape, float("nan"))
    return made


TrainSteps.batch = batch
"""
FP64, DDP = ("precision=fp64", "data.num_workers=0"), ("trainer.devices=2", "strategy=ddp")
SHARDED = ("trainer.devices=2", "strategy=fsdp2")
STABLE = ("optim=stable_adamw", "optim.layer_decay=0.7", "optim.lr=0.01")


def words(data: Path, run: Path, *extra: str) -> list[str]:
    common = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every_steps=3", f"run.dir={run}")
    return _runs.train_words(data, *common, *FP64, *extra)


def told(run: Path) -> list[dict[str, Any]]:
    """The rewinds of a run, without the time."""
    lines = RunDirectory(run).rewinds()
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


class Killed(BaseException):
    """Stands for SIGKILL: nothing that is not on the disk by now is left."""


def killing(step: int) -> Any:
    """`append_line` that ends with the row of `step`."""

    def append(path: Path, row: Mapping[str, Any]) -> None:
        append_line(path, row)
        if row["step"] == step:
            raise Killed

    return append


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process that is started from now on, batch 7 of the stream has pixels that are no numbers."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )


@pytest.mark.slow
def test_a_loss_above_the_threshold_is_taken_back_wherever_checkpoints_lie(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A threshold so low that the noise of a small run passes it. A run that saves at other steps and is killed, and
    one on two ranks, go back to the same steps: what is learned does not depend on where a checkpoint lies."""
    rules = ("optim.lr=0.03", "spikes.threshold=1", "spikes.window=3", "spikes.rewind_steps=2", "spikes.max_rewinds=50")
    untouched, killed, two, twin = (tmp_path / name for name in ("untouched", "killed", "two", "twin"))
    assert command_line.main(words(scenes, untouched, *rules)) == 0
    assert len(told(untouched)) >= 2
    assert all(row["value"] > row["threshold"] and row["kept"] == row["step"] - 3 for row in told(untouched))
    other = words(scenes, killed, *rules, "checkpoint.every_steps=7", "checkpoint.keep=1")
    for step in (told(untouched)[0]["step"], NUM_STEPS - 1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(recorder, "append_line", killing(step))
            command_line.main(other)
    assert command_line.main(other) == 0
    assert _runs.learned(killed) == _runs.learned(untouched)
    assert told(killed) == told(untouched)
    _runs.call(tmp_path, words(scenes, two, *rules, *DDP))
    assert _runs.losses(two) == pytest.approx(_runs.losses(untouched), abs=1e-12)  # measured 1.3e-15
    assert [row["skipped"] for row in told(two)] == [row["skipped"] for row in told(untouched)]
    assert command_line.main(words(scenes, twin, "optim.lr=0.03")) == 0
    assert _runs.learned(twin) != _runs.learned(untouched)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_a_poisoned_batch_is_passed_over_alike_by_every_strategy(tmp_path: Path, scenes: Path) -> None:
    """With StableAdamW and layer-wise rates, so that what one strategy learns is what the others learn there too."""
    alone, killed, sharded = (tmp_path / name for name in ("alone", "killed", "sharded"))
    _runs.call_anew(tmp_path, words(scenes, alone, *STABLE))
    assert [row["step"] for row in _runs.rows(alone)] == list(range(1, NUM_STEPS + 1))
    assert told(alone) == [{
        "event": "rewind", "step": 8, "reason": "the loss is not finite", "value": "nan", "threshold": None,
        "kept": 7, "skipped": [7, 8],
    }]  # fmt: skip
    _runs.kill_after(tmp_path, words(scenes, killed, *DDP, *STABLE), killed, 8)
    _runs.call_anew(tmp_path, words(scenes, killed, *DDP, *STABLE))
    _runs.call_anew(tmp_path, words(scenes, sharded, *SHARDED, *STABLE))
    for run in (killed, sharded):
        assert told(run) == told(alone)
        assert _runs.losses(run) == pytest.approx(_runs.losses(alone), abs=1e-12)  # measured 1.3e-15


@pytest.fixture(scope="module")
def poisoned_here() -> Iterator[None]:
    """As `poisoned`, in this process."""
    honest = TrainSteps.batch

    def batch(self: TrainSteps, step: int) -> Any:
        made = honest(self, step)
        return {**made, "images": torch.full(made["images"].shape, float("nan"))} if step == BAD_BATCH else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSteps, "batch", batch)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def untouched(poisoned_here: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the poisoned batch that nobody kills."""
    run = tmp_path_factory.mktemp("untouched") / "run"
    assert command_line.main(words(scenes, run)) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["retired", "told", "truncated"])
def test_killed_at_any_moment_of_a_rewind(
    tmp_path: Path, scenes: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill(patch, moment)
        with pytest.raises(Killed):
            command_line.main(words(scenes, killed))
    assert len(told(killed)) == (moment != "retired")
    assert command_line.main(words(scenes, killed)) == 0
    assert _runs.learned(killed) == _runs.learned(untouched)
    assert told(killed) == told(untouched)
    events = [json.loads(line)["event"] for line in (killed / "events.jsonl").read_text().splitlines()]
    assert events.count("rewind") == 1 and events.count("finished") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_here")
def test_a_run_that_gave_up_goes_on_where_more_rewinds_are_allowed(
    tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        assert command_line.main(words(scenes, run, "spikes.max_rewinds=0")) == 1
        assert "step 8 is a spike after 0 rewinds: the loss is not finite" in capsys.readouterr().err
        assert _runs.last_step(run) == BAD_BATCH
    assert command_line.main(words(scenes, run)) == 0
    assert _runs.last_step(run) == NUM_STEPS and len(told(run)) == 1


def kill(patch: pytest.MonkeyPatch, moment: str) -> None:
    """From now on a rewind ends once the checkpoints beyond it are gone, its line is written, or records are cut."""
    owner, name, is_rewinding = {
        "retired": (rewinds.checkpoints, "newest", lambda folder: any(folder.glob("step-*"))),
        "told": (RunDirectory, "event", lambda run, name, fields: name == "rewind"),
        "truncated": (RunDirectory, "rewind", lambda run, step: bool(run.rewinds())),
    }[moment]
    honest = getattr(owner, name)

    def ending(*arguments: Any) -> Any:
        result = honest(*arguments)
        if is_rewinding(*arguments):
            raise Killed
        return result

    patch.setattr(owner, name, ending)
