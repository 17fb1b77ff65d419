"""`vlm-train watch`: what it shows of runs in every state, from files alone."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _runs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vlm_train
from vlm_train.cli import frame as pictures
from vlm_train.cli.frame import frame, summary
from vlm_train.cli.main import main
from vlm_train.cli.terminal import Terminal
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


def terminal(width: int = 100, height: int = 60, *, colour: bool = False, encoding: str = "utf-8") -> Terminal:
    return Terminal(width=width, height=height, colour=colour, encoding=encoding)


def shown(run: RunDirectory, width: int = 100) -> str:
    return "\n".join(frame(Reader(run).look(), terminal(width)))


@contextmanager
def held(run: RunDirectory) -> Iterator[None]:
    """The run is trained by a process."""
    with open(run.path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_picture_tells_what_the_files_tell(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "60")
    with held(run):
        assert main(["watch", str(run.path), "--once"]) == 0
    picture = capsys.readouterr().out
    for words in ("50%  step 50 of 100", "5.0 s left", "loss 3.0000", "240 samples/s", "waiting for data 25%",
                  "goodput 60.0%", "compute 60%", "data wait 30%", "retrieval after step 50: text to image R@1 41.5",
                  "checkpoint of step 40", "rank 1 has not reached all_reduce of step 30"):  # fmt: skip
        assert words in picture, words
    assert "\x1b" not in picture


def test_a_run_is_alive_while_a_process_holds_it(run: RunDirectory) -> None:
    assert "nobody trains it" in shown(run) and "left" not in shown(run)
    with held(run):
        assert Reader(run).look().status == "running" and "5.0 s left" in shown(run)
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
    with tempfile.TemporaryDirectory() as folder:
        growing, path = Growing(Path(folder) / "rows", dict), Path(folder) / "rows"
        for part in parts:
            for value in part:
                append_line(path, {"value": value})
            growing.look()
        assert [row["value"] for row in growing.look()] == [value for part in parts for value in part]


LOSSES = st.lists(st.floats(width=32) | st.just(float("nan")), min_size=1, max_size=300)


@given(LOSSES, st.integers(30, 200))
def test_a_curve_fits_its_terminal(losses: list[float], width: int) -> None:
    assert all(len(line) <= width for line in pictures._curve(losses, width))


def test_a_line_that_is_cut_says_so(run: RunDirectory) -> None:
    view = Reader(run).look()
    title = frame(view, terminal(1000))[0]
    for width in range(1, 200):
        lines = frame(view, terminal(width, 200, colour=width % 2 == 0))
        lines = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in lines]
        assert all(len(line) <= width for line in lines)
        assert lines[0] == (title if len(title) <= width else title[: width - 1] + "…")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_terminal_lacks_have_others_in_their_place(run: RunDirectory, encoding: str) -> None:
    view = Reader(run).look()
    picture = "\n".join(frame(view, terminal(60, encoding=encoding)))
    assert picture.isascii() and "###" in picture and "..." in picture and picture.startswith("* ")
    assert not "\n".join(frame(view, terminal(60))).isascii()


def test_a_curve_goes_from_the_first_loss_to_the_last() -> None:
    falling, rising = (pictures._curve(losses, 40)[1:] for losses in ([2.0, 1.0], [1.0, 2.0]))
    assert falling != rising
    assert falling[0][10] != " " and falling[-1][-1] != " " and falling[0][-1] == " "
    assert rising[0][-1] != " " and rising[-1][10] != " " and rising[0][10] == " "


def test_colours_only_where_they_are_wanted(run: RunDirectory) -> None:
    view = Reader(run).look()
    assert "\x1b[38;2;" in "\n".join(frame(view, terminal(colour=True)))
    assert "\x1b" not in "\n".join(frame(view, terminal()))
    assert len(frame(view, terminal(height=12, colour=True))) == 11


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


def watched(run: RunDirectory, *, columns: int = 100, seconds: float = 60, **environment: str) -> tuple[int, str]:
    """`vlm-train watch` on a terminal: (exit code, what it wrote there)."""
    master, slave = pty.openpty()
    fixed = {"PYTHONPATH": str(Path(vlm_train.__file__).parents[1]), "TERM": "xterm", "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "vlm_train.cli.main", "watch", str(run.path)]
    process = subprocess.Popen(command, env={**os.environ, **fixed, **environment}, stdout=slave, stdin=slave)
    os.close(slave)
    written, deadline = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    written += os.read(master, 65536)
                except OSError:  # nobody has the other end any more
                    break
        return process.wait(max(deadline - time.monotonic(), 0.1)), written.decode()
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_watching_a_killed_run_ends_on_a_terminal_as_in_a_pipe(run: RunDirectory) -> None:
    code, written = watched(run)
    last = written.rpartition("\x1b[?1049l")[2]
    assert code == 1 and "nobody trains it" in last and "\x1b[38;2;" in last
    assert main(["watch", str(run.path)]) == 1  # into a pipe
    run.event("finished", {"step": 100})
    assert watched(run)[0] == 0 == main(["watch", str(run.path)])


def test_the_user_may_want_no_colours(run: RunDirectory) -> None:
    _, without = watched(run, NO_COLOR="1")
    _, dumb = watched(run, TERM="dumb")
    assert "\x1b[?1049h" in without and "\x1b[38" not in without and "nobody trains it" in without
    assert dumb.startswith("ended step 50/100") and "\x1b" not in dumb


def test_a_run_whose_job_has_not_begun_is_waited_for(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = run.path / "submit" / "20261129-120000" / "job.sbatch"
    job.parent.mkdir(parents=True)
    assert main(["watch", str(run.path), "--once"]) == 2  # the twin: nothing was submitted
    job.touch()
    reader = Reader(run)
    assert not reader.look().is_over and "waits for its job" in shown(run)
    run.create()
    run.config.write_text("trainer:\n  max_steps: 100\n")
    with held(run):
        run.event("start", {"step": 0})
        assert reader.look().status == "running"
    os.utime(job, (time.time() - 100,) * 2)
    assert reader.look().status == "ended"  # its job has begun, and the run was killed
    run.event("interrupted", {"step": 3, "signal": "SIGTERM"})
    run.event("requeue", {"step": 3, "job": "7", "reason": "SIGTERM"})
    assert reader.look().status == "waiting"
    run.event("not_requeued", {"step": 3})
    run.event("finished", {"step": 100})
    os.utime(job, (time.time() + 100,) * 2)
    assert reader.look().status == "finished"  # what was submitted since has nothing to do


def test_a_run_that_failed_says_so(run: RunDirectory) -> None:
    run.event("failed", {"error": "the data of this run is not the data of the checkpoint\n  remedy:  restore it"})
    picture = shown(run)
    assert picture.startswith("● failed,") and "killed" not in picture
    assert "failed       the data of this run is not the data of the checkpoint" in picture
    run.event("resume", {"step": 40})
    with held(run):
        assert Reader(run).look().status == "running"


def test_between_two_stages_a_run_goes_on(run: RunDirectory) -> None:
    stage = RunDirectory(run.path / "stage-01-first")
    stage.create()
    stage.config.write_text("trainer:\n  max_steps: 7\n")
    stage.event("finished", {"step": 7})
    with held(run):
        assert Reader(run).look().status == "running"
    assert Reader(run).look().status == "ended"  # the twin: nobody is there to begin the next one
    run.event("finished", {"stages": ["stage-01-first"]})
    assert Reader(run).look().status == "finished"


CONFIGS = {
    "empty": b"", "a list": b"- a\n- b\n", "a text": b"hello\n", "broken": b"trainer: {max_steps: [\n",
    "not UTF-8": b"trainer:\n  max_steps: 100\nname: \xff\xfe\n", "words": b"trainer: {max_steps: many}\n",
    "none": b"trainer: {max_steps: 0}\n", "a date": b"trainer: {max_steps: 100}\nday: 2026-13-45\n",
}  # fmt: skip


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS.keys())
def test_without_a_config_what_is_there_is_shown(
    run: RunDirectory, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config.write_bytes(content)
    assert main(["watch", str(run.path), "--once"]) == 0
    picture = capsys.readouterr().out
    assert "config.yaml cannot be read: " in picture and "\nstep 50\n" in picture and "loss 3.0000" in picture
    assert main(["watch", str(run.path)]) == 1
    assert capsys.readouterr().out.startswith("ended step 50, loss 3.0000")


RECORDS = ["metrics.jsonl", "events.jsonl", "time.jsonl", "evals/history.jsonl"]
BAD = [b"[1]", b"{}", b"5", b"", b"{", b'{"step": 3, "note": "\xff"}', b"\x00", b"[" * 5000]


@pytest.mark.parametrize("name", RECORDS)
def test_lines_that_are_no_records_are_left_out_and_counted(run: RunDirectory, name: str) -> None:
    before = Reader(run).look()
    whole = (run.path / name).read_bytes()
    first, _, rest = whole.partition(b"\n")
    (run.path / name).write_bytes(b"\n".join([BAD[0], first, *BAD[1:], rest]))
    reader = Reader(run)
    for _ in range(2):  # one that has been counted is not counted again
        view = reader.look()
        assert view.num_bad == {name: len(BAD)} and not before.num_bad
        assert (view.metrics, view.events, view.evals, view.time) == (
            before.metrics, before.events, before.evals, before.time,
        )  # fmt: skip
    assert f"lines left out, for they are no records: {len(BAD)} of {name}" in shown(run)
    assert main(["watch", str(run.path), "--once"]) == 0


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.data())
def test_no_value_of_a_record_ends_the_watching(data: st.DataObject) -> None:
    """A record of each file, in which any field has become anything."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        run.evals.mkdir()
        run.config.write_text("trainer:\n  max_steps: 100\n")
        seconds: dict[str, Any] = dict.fromkeys(ACCOUNTS, 1.0)
        rows: dict[str, dict[str, Any]] = {
            "metrics.jsonl": metrics_row(3),
            "events.jsonl": {"event": "hang", "time": 1e9, "sentence": "rank 1 waits"},
            "time.jsonl": {"life": 1, "began": 100.0, "time": 110.0, "seconds": seconds},
            "evals/history.jsonl": {"step": 3, "name": "retrieval", "text_to_image": {"R@1": 4.5},
                                    "chance": {"R@1": 1.0}, "interval_95": {"text_to_image": {"R@1": [1.0, 2.0]}}},
        }  # fmt: skip
        for name, row in rows.items():
            place = data.draw(st.sampled_from([row, *(part for part in row.values() if isinstance(part, dict))]))
            place[data.draw(st.sampled_from(list(place)))] = data.draw(ANY)
            append_line(run.path / name, row)
        with held(run):
            view = Reader(run).look()
        assert frame(view, terminal(colour=True)) and summary(view)
        assert sum(view.num_bad.values()) <= len(rows)


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
    assert "ended step" in _runs.call(tmp_path, ["watch", str(run)], expect=1)
