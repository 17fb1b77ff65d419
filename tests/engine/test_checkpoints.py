from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_train.engine import checkpoints
from vlm_train.errors import CheckpointError


def save(folder: Path, step: int, content: bytes = b"weights", keep: int = 2) -> Path:
    temporary = checkpoints.begin(folder, step)
    (temporary / checkpoints.STATE).write_bytes(content)
    return checkpoints.commit(temporary, step, keep)


def test_a_committed_checkpoint_verifies_and_is_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 10)
    checkpoints.verify(path)
    assert checkpoints.newest(tmp_path) == path
    assert (tmp_path / "LATEST").read_text().strip() == "step-00000010"
    assert checkpoints.step_of(path) == 10


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000002", "step-00000003"]


def test_going_back_removes_what_comes_after(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    checkpoints.retire_after(tmp_path, 1)
    assert [checkpoints.step_of(path) for path in checkpoints.committed(tmp_path)] == [1]


def test_an_unfinished_one_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    (checkpoints.begin(tmp_path, 2) / checkpoints.STATE).write_bytes(b"half")
    assert checkpoints.newest(tmp_path) == good
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    state = bad / checkpoints.STATE
    if damage == "remove":
        state.unlink()
    else:
        state.write_bytes(b"weighty" if damage == "flip" else b"weig")
    assert checkpoints.newest(tmp_path) == good
    (good / checkpoints.STATE).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        checkpoints.newest(tmp_path)


def test_a_writer_killed_at_any_instant_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """A real process saves in a loop and is killed by SIGKILL; whatever is committed must verify."""
    save(tmp_path, 0)
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from vlm_train.engine import checkpoints as c\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for step in range(1, 10**6):\n"
        "    t = c.begin(folder, step); (t / c.STATE).write_bytes(bytes([step % 251]) * 200_000)\n"
        "    c.commit(t, step, 2)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), root])
        time.sleep(0.25 + 0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        newest = checkpoints.newest(tmp_path)
        assert newest is not None
        checkpoints.verify(newest)
