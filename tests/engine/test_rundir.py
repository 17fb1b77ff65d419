from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.engine.rundir import RunDirectory, append_line, read_lines, write_atomic
from vlm_train.errors import CheckpointError, VlmError


@given(num_rows=st.integers(0, 12), step=st.integers(0, 14), torn=st.integers(0, 20))
def test_a_rewound_file_equals_one_that_stopped_there(tmp_path_factory, num_rows: int, step: int, torn: int) -> None:
    """Whatever was written before the kill, and wherever the last line was torn."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    expected = RunDirectory(tmp_path_factory.mktemp("expected"))
    for number in range(1, num_rows + 1):
        row = {"step": number, "loss": number / 7}
        append_line(run.metrics, row)
        if number <= step:
            append_line(expected.metrics, row)
    if num_rows:
        with open(run.metrics, "a") as file:
            file.write(json.dumps({"step": num_rows + 1, "loss": 0.1})[:torn])
        run.rewind(step)
        assert run.metrics.read_bytes() == (expected.metrics.read_bytes() if expected.metrics.exists() else b"")


def test_a_damaged_line_in_the_middle_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        list(read_lines(tmp_path / "metrics.jsonl"))


def test_an_unwritable_file_is_a_clear_error() -> None:
    with pytest.raises(VlmError, match="No space left"):
        append_line(Path("/dev/full"), {"step": 1})


def test_atomic_writes_leave_no_debris(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", "a")
    write_atomic(tmp_path / "x", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "b"


def test_finished_is_what_the_events_say(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert not run.is_finished()
    run.event("start", {"step": 0})
    assert not run.is_finished()
    run.event("finished", {"step": 3})
    assert run.is_finished()
    run.event("resume", {"step": 2})
    assert not run.is_finished()
