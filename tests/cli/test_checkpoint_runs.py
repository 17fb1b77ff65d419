"""`vlm-train checkpoints`: what is shown of what a run has saved, and what is removed; and how real runs save."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import _runs
import pytest
import torch

from vlm_train.cli.main import main
from vlm_train.engine import checkpoints, states
from vlm_train.engine.rundir import RunDirectory


def run_with(path: Path, steps: list[int], config: str = "checkpoint: {keep: 3}") -> RunDirectory:
    run = RunDirectory(path)
    run.create()
    run.config.write_text(config)
    for step in steps:
        temporary = checkpoints.begin(run.checkpoints, step)
        (temporary / checkpoints.STATE).write_bytes(bytes([step]) * 1_500_000)
        checkpoints.commit(temporary, step, 99)
    return run


def told(capsys: pytest.CaptureFixture[str], *words: str, expect: int = 0) -> str:
    assert main(["checkpoints", *words]) == expect
    output = capsys.readouterr()
    return output.out + output.err


def test_each_checkpoint_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", [5, 10])
    lines = told(capsys, "list", str(run.path)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["5", "10"]
    assert all("1.5" in line and "one rank" in line and line.endswith("complete") for line in lines[2:])
    assert told(capsys, "verify", str(run.path)).count("verified") == 2


def test_a_bad_one_is_told_and_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", [5, 10])
    (run.checkpoints / "step-00000005" / checkpoints.STATE).write_bytes(b"x" * 1_500_000)
    assert told(capsys, "list", str(run.path)).count("complete") == 2  # the twin: sizes alone do not tell
    output = told(capsys, "verify", str(run.path), expect=1)
    assert "the checksum of state.ckpt does not match" in output and output.count("verified") == 1
    (run.checkpoints / "step-00000010" / "manifest.json").unlink()
    assert "step-00000010 is not a committed checkpoint" in told(capsys, "list", str(run.path), expect=1)


def test_pruning_leaves_what_the_run_would_have_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", [5, 10, 15, 20, 25], "checkpoint: {keep: 3, keep_every_steps: 5}")
    assert "nothing to remove" in told(capsys, "prune", str(run.path), "--keep", "1")
    run.config.write_text("checkpoint: {keep: 3, keep_every_steps: 10}")
    assert "would remove" in told(capsys, "prune", str(run.path), "--dry-run")
    assert len(checkpoints.committed(run.checkpoints)) == 5
    assert "removed" in told(capsys, "prune", str(run.path))
    assert [checkpoints.step_of(path) for path in checkpoints.committed(run.checkpoints)] == [10, 15, 20, 25]
    told(capsys, "prune", str(run.path), "--keep", "1")
    assert [checkpoints.step_of(path) for path in checkpoints.committed(run.checkpoints)] == [10, 20, 25]


def test_each_stage_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with(tmp_path / "run", [])
    run_with(tmp_path / "run" / "stage-01-one", [3])
    run_with(tmp_path / "run" / "stage-02-two", [4])
    output = told(capsys, "verify", str(tmp_path / "run"))
    assert "stage-01-one" in output and "stage-02-two" in output and output.count("verified") == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["verif", "RUN"], "vlm-train checkpoints verify"),
        (["list"], "needs one run"),
        (["list", "nowhere"], "no config.yaml"),
        (["prune", "RUN", "--keep"], "--keep needs a number"),
        (["prune", "RUN", "--keep", "0"], "a whole number from 1"),
        (["prune", "RUN", "--force"], "needs one run"),
    ],
)
def test_a_mistake_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    run = run_with(tmp_path / "run", [5])
    output = told(capsys, *[str(run.path) if word == "RUN" else word for word in words], expect=2)
    assert expected in output and len(checkpoints.committed(run.checkpoints)) == 1


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("checkpoint.keep_every_steps=6", "allowed: a multiple of 4"),
        ("checkpoint.keep_every_steps=0", "out of range"),
        ("checkpoint.copy_to=nowhere", "checkpoint.copy_to is no URL"),
    ],
)
def test_settings_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str], word: str, expected: str) -> None:
    assert main(["train", "experiment=quickstart", "checkpoint.every_steps=4", word]) == 2
    assert expected in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys; from vlm_train.cli.main import main; main(['checkpoints', '--help']); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "prune RUN" in output and " torch " not in output


@pytest.mark.slow
def test_both_ways_of_saving_save_the_same(tmp_path: Path, scenes: Path) -> None:
    """Bit for bit, weights and moments; and one in so many steps stays. The twin is another step of the same run."""
    kept = {}
    for name in ("true", "false"):
        run = tmp_path / name
        extra = ("trainer.max_steps=9", "checkpoint.every_steps=2", "checkpoint.keep=1", f"run.dir={run}")
        settings = (f"checkpoint.asynchronous={name}", "checkpoint.keep_every_steps=4", "evaluation=none")
        _runs.call(tmp_path, _runs.train_words(scenes, *extra, *settings))
        kept[name] = checkpoints.committed(run / "checkpoints")
        assert [checkpoints.step_of(path) for path in kept[name]] == [4, 8, 9]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert [row["step"] for row in events if row["event"] == "checkpoint"] == [2, 4, 6, 8, 9]
    for one, other in zip(kept["true"], kept["false"], strict=True):
        assert alike(states_of(one), states_of(other))
    assert not alike(states_of(kept["true"][0]), states_of(kept["true"][1]))
    assert states.read_weights(kept["true"][0])


def states_of(path: Path) -> dict[str, torch.Tensor]:
    """Weights and moments by name."""
    whole = torch.load(path / checkpoints.STATE, weights_only=True)
    moments = whole["optimizer_states"][0]["state"]
    return whole["state_dict"] | {f"{k}.{name}": v for k, slots in moments.items() for name, v in slots.items()}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("is_copied", [True, False], ids=["right", "twin"])
def test_a_run_that_lost_its_machine_goes_on_from_its_copies(tmp_path: Path, scenes: Path, is_copied: bool) -> None:
    """The twin's copies are lost as well: it starts from the beginning. Both learn what an untouched run learns."""
    run, untouched = tmp_path / "run", tmp_path / "untouched"
    common = ("trainer.max_steps=40", "checkpoint.every_steps=4", "evaluation=none", "data.num_workers=0")
    _runs.call(tmp_path, _runs.train_words(scenes, *common, f"run.dir={untouched}"))
    command = _runs.train_words(scenes, *common, f"run.dir={run}", f"checkpoint.copy_to=file://{tmp_path / 'store'}")
    _runs.kill_after(tmp_path, command, run, 30)
    assert list((tmp_path / "store" / "run").glob("step-*/manifest.json"))
    shutil.rmtree(run)
    if not is_copied:
        shutil.rmtree(tmp_path / "store")
    _runs.call(tmp_path, command)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert ("resume" in [row["event"] for row in events]) == is_copied
    assert _runs.learned(run) == _runs.learned(untouched)
    assert (tmp_path / "store" / "run" / "step-00000040" / "manifest.json").is_file()  # waited for at the end
