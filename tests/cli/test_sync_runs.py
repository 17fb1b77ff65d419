"""`vlm-train sync`, and a run with logger=wandb offline that is killed and goes on: one W&B run, each step once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlm_train.cli.main import main
from vlm_train.engine.rundir import RunDirectory, append_line

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
import _runs
from test_wandb import history


def test_a_killed_run_is_one_offline_run(scenes: Path, tmp_path: Path) -> None:
    options = ("trainer.max_steps=12", "checkpoint.every_steps=4", "logger=wandb", "logger.mode=offline", "run.dir=run")
    words = _runs.train_words(scenes, *options)
    run = tmp_path / "run"
    _runs.kill_after(tmp_path, words, run, 6)
    assert not list(run.glob("wandb/*"))  # W&B cannot join the files of two processes
    _runs.call(tmp_path, words)
    rows = [row for row in history(run) if "loss" in row]
    assert [row["_step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == [row["loss"] for row in _runs.rows(run)]
    _runs.call(tmp_path, ["sync", "run", "--mode", "offline"])
    assert len([row for row in history(run) if "loss" in row]) == 12


def test_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync"]) == 0 and "usage" in capsys.readouterr().out
    assert main(["sync", str(tmp_path)]) == 2 and "config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("run: {id: x}\nlogger: {name: none}\n")
    assert main(["sync", str(tmp_path)]) == 2 and "nothing to send" in capsys.readouterr().err


CONFIGS = {
    "empty": b"", "a list": b"- a\n", "a number": b"5\n", "broken": b"run: {id: [\n", "not UTF-8": b"run: \xff\xfe\n",
    "deep": b"[" * 5000, "refers to nothing": b"run: {id: '${there.is.none}'}\n",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of three steps."""
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text("run: {id: x}\nlogger: {name: none}\n")
    for step in range(1, 4):
        append_line(run.metrics, {"step": step, "loss": 1.0})
    return run


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_damaged_config_is_told(run: RunDirectory, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    run.config.write_bytes(content)
    assert main(["sync", str(run.path), "--mode", "offline"]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(f"error: {run.config} is damaged") and "restore it" in told and not list(run.path.glob("wandb"))
    )


def test_what_a_config_does_not_say(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what is sent the config is only a part."""
    run.config.write_text("run: [1]\nlogger: text\n")
    assert main(["sync", str(run.path), "--mode", "offline"]) == 0 and "3 rows sent" in capsys.readouterr().out
    assert [path.name.rpartition("-")[2] for path in run.path.glob("wandb/offline-run-*")] == ["run"]


def test_remedies_are_words_of_sync(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(run.path))
    assert main(["sync", str(run.path)]) == 2
    assert "remedy:  `wandb login`, or --mode offline\n" in capsys.readouterr().err
    assert main(["sync", str(run.path), "--project", "a/b", "--mode", "offline"]) == 2
    told = capsys.readouterr().err
    assert "remedy:  --project NAME" in told and "login" not in told
    assert main(["sync", str(run.path / "nowhere")]) == 2 and "run=" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "evals/history.jsonl"])
@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b"{}", b"{"])
def test_records_that_cannot_be_read_are_told(
    run: RunDirectory, name: str, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the good folder of before stays."""
    good = run.path / "wandb" / "offline-run-20261129_120000-x"
    good.mkdir(parents=True)
    file = run.path / name
    file.write_bytes((file.read_bytes() if file.exists() else b"") + line + b"\n")
    assert main(["sync", str(run.path), "--mode", "offline"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {file} line {4 if name == 'metrics.jsonl' else 1} ") and good.is_dir()


def test_of_a_run_in_stages_its_stages_are_sent(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    run.metrics.rename(run.path / "stage-01-first")
    assert main(["sync", str(run.path)]) == 2
    assert f"remedy:  vlm-train sync {run.path}/stage-01-first\n" in capsys.readouterr().err
