"""`vlm-train watch`: what it shows of runs in every state, from files alone."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import _runs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vlm_train
from vlm_train.cli import frame as pictures
from vlm_train.cli.frame import frame, summary
from vlm_train.cli.main import main
from vlm_train.cli.watched import Growing, Reader
from vlm_train.engine.heartbeat import ACCOUNTS, Heartbeat, page_of
from vlm_train.engine.rundir import RunDirectory, append_line


def metrics_row(step: int, loss: float = 3.0) -> dict:
    return {"step": step, "samples": 24 * step, "loss": loss, "lr": 1e-3, "grad_norm": 2.0,
            "samples_per_second": 240.0, "data_wait": 0.25, "mfu": 0.2}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Half a run: 50 of 100 steps, an evaluation, a checkpoint, a hang, and time."""
    made = RunDirectory(tmp_path / "run")
    made.create()
    made.config.write_text("trainer:\n  max_steps: 100\n")
    made.event("start", {"step": 0})
    for step in range(1, 51):
        append_line(made.metrics, metrics_row(step, 4.0 - step / 50))
    made.event("hang", {"step": 30, "sentence": "rank 1 has not reached all_reduce of step 30", "ranks": []})
    append_line(made.history, {"step": 50, "name": "retrieval", "text_to_image": {"R@1": 41.5}, "num_pairs": 80})
    folder = made.checkpoints / "step-00000040"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    seconds = dict.fromkeys(ACCOUNTS, 0.0) | {"compute": 6.0, "data_wait": 3.0, "startup": 1.0}
    append_line(made.time_of(0), {"life": 1, "began": 100.0, "time": 110.0, "seconds": seconds})
    return made


def shown(run: RunDirectory, width: int = 100) -> str:
    return "\n".join(frame(Reader(run).look(), width, 60, colour=False))


def test_a_picture_tells_what_the_files_tell(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "60")
    assert main(["watch", str(run.path), "--once"]) == 0
    picture = capsys.readouterr().out
    for words in ("50%  step 50 of 100", "5.0 s left", "loss 3.0000", "240 samples/s", "waiting for data 25%",
                  "goodput 60.0%", "compute 60%", "data wait 30%", "retrieval after step 50: text to image R@1 41.5",
                  "checkpoint of step 40", "rank 1 has not reached all_reduce of step 30"):  # fmt: skip
        assert words in picture, words
    assert "\x1b" not in picture


def test_a_run_is_alive_while_a_process_holds_it(run: RunDirectory) -> None:
    assert "nobody trains it" in shown(run)
    with open(run.path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert Reader(run).look().status == "running"
    run.event("interrupted", {"step": 50, "signal": "SIGTERM"})
    assert Reader(run).look().status == "stopped"
    run.event("finished", {"step": 100})
    assert Reader(run).look().status == "finished"
    assert "left" not in shown(run)


def test_ranks_of_this_machine_are_told(run: RunDirectory) -> None:
    page = Heartbeat(page_of(run.path, 0), rank=0, life=1, began=time.time())
    page.move(51, ACCOUNTS.index("communication"), b"all_gather")
    assert "rank 0: communication of step 51 in all_gather, for " in shown(run)
    page.remove()
    assert "rank 0" not in shown(run)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text("trainer:\n  max_steps: 10\n")
    picture = shown(run)
    assert "0%  step 0 of 10" in picture and "no checkpoint yet" in picture
    assert summary(Reader(run).look()) == "ended step 0/10"


def test_of_a_run_in_stages_the_last_that_has_begun_is_shown(run: RunDirectory) -> None:
    reader = Reader(run)
    assert reader.look().step == 50
    stage = RunDirectory(run.path / "stage-01-first")
    stage.create()
    stage.config.write_text("trainer:\n  max_steps: 7\n")
    append_line(stage.metrics, metrics_row(3))
    assert (reader.look().step, reader.look().num_steps) == (3, 7)


def test_rows_are_read_as_they_come(run: RunDirectory) -> None:
    reader = Reader(run)
    assert reader.look().step == 50
    with open(run.metrics, "a") as file:
        file.write(json.dumps(metrics_row(51)) + "\n" + json.dumps(metrics_row(52))[:20])
    assert reader.look().step == 51  # the last line is not whole
    with open(run.metrics, "a") as file:
        file.write(json.dumps(metrics_row(52))[20:] + "\n")
    assert [row["step"] for row in reader.look().metrics] == list(range(1, 53))
    run.rewind(40)  # another process resumes
    assert [row["step"] for row in reader.look().metrics] == list(range(1, 41))


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6))
def test_growing_is_the_same_as_reading_at_once(parts: list[list[int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        growing, path = Growing(Path(folder) / "rows"), Path(folder) / "rows"
        for part in parts:
            for value in part:
                append_line(path, {"value": value})
            growing.look()
        assert [row["value"] for row in growing.look()] == [value for part in parts for value in part]


LOSSES = st.lists(st.floats(width=32) | st.just(float("nan")), min_size=1, max_size=300)


@given(LOSSES, st.integers(40, 200))
def test_a_curve_fits_its_terminal(losses: list[float], width: int) -> None:
    assert all(len(line) <= width for line in pictures._curve(losses, width))


def test_a_curve_goes_from_the_first_loss_to_the_last() -> None:
    falling, rising = (pictures._curve(losses, 40)[1:] for losses in ([2.0, 1.0], [1.0, 2.0]))
    assert falling != rising
    assert falling[0][10] != " " and falling[-1][-1] != " " and falling[0][-1] == " "
    assert rising[0][-1] != " " and rising[-1][10] != " " and rising[0][10] == " "


def test_colours_only_where_they_are_wanted(run: RunDirectory) -> None:
    view = Reader(run).look()
    assert "\x1b[38;2;" in "\n".join(frame(view, 100, 60, colour=True))
    assert len(frame(view, 100, 12, colour=True)) == 11


@pytest.mark.parametrize("words", [["a", "b"], ["nowhere"], ["--twice", "x"]])
def test_misuse_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", *words]) == 2
    assert "error:" in capsys.readouterr().err
    assert main(["watch", "--help"]) == 0 and "usage: vlm-train watch" in capsys.readouterr().out


def test_it_does_not_wait_for_torch(run: RunDirectory) -> None:
    code = f"import sys; from vlm_train.cli.main import main; main(['watch', {str(run.path)!r}, '--once'])"
    environment = {**os.environ, "PYTHONPATH": str(Path(vlm_train.__file__).parents[1])}
    command = [sys.executable, "-c", f"{code}; print('torch' in sys.modules, 'yaml' in sys.modules)"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False True"  # yaml: the check sees what is imported


@pytest.mark.slow
def test_a_run_is_watched_while_it_trains(tmp_path: Path, scenes: Path) -> None:
    """Into a pipe: a line, and the end of the watching with the end of the run."""
    run = tmp_path / "run"
    process = _runs.start(tmp_path, _runs.train_words(scenes, "trainer.max_steps=5000", f"run.dir={run}"))
    try:
        deadline = time.monotonic() + 200
        while _runs.last_step(run) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        view = Reader(RunDirectory(run)).look()
        assert view.status == "running" and view.step >= 3 and [beat.rank for beat in view.beats] == [0]
    finally:
        process.kill()
        process.wait()
    while Reader(RunDirectory(run)).look().status == "running" and time.monotonic() < deadline + 30:
        time.sleep(0.05)  # the loader's workers, which have the lock too, need a moment to vanish
    assert "ended step" in _runs.call_anew(tmp_path, ["watch", str(run)])
