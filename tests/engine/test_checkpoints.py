from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.engine import checkpoints, states
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


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said aloud."""
    told: list[str] = []
    monkeypatch.setattr(checkpoints.LOG, "warning", lambda message, *words: told.append(message % words))
    return told


def save_sharded(folder: Path, step: int) -> Path:
    """As two ranks write it: a tensor of 4 values, two each, all equal to the step."""
    temporary = checkpoints.begin(folder, step)
    target = temporary / checkpoints.STATE
    halves = {f"w{half}": torch.full((2,), float(step)) for half in range(2)}
    writer = distributed_checkpoint.FileSystemWriter(target, single_file_per_rank=False, thread_count=2)
    distributed_checkpoint.save({"state_dict": halves}, storage_writer=writer, no_dist=True)
    torch.save({"global_step": step}, target / "meta.pt")
    return checkpoints.commit(temporary, step, keep=2)


def shards(path: Path) -> list[Path]:
    return sorted((path / checkpoints.STATE).glob("*.distcp"))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "missing file": lambda bad, good: shards(bad)[0].unlink(),
    "short file": lambda bad, good: shards(bad)[0].write_bytes(shards(bad)[0].read_bytes()[:-1]),
    "flipped bit": lambda bad, good: flip(shards(bad)[1]),
    "shard of another step": lambda bad, good: shutil.copy(shards(good)[0], shards(bad)[0]),
    "metadata of another step": lambda bad, good: shutil.copy(
        good / checkpoints.STATE / "meta.pt", bad / checkpoints.STATE / "meta.pt"
    ),
    "missing manifest": lambda bad, good: (bad / "manifest.json").unlink(),
    "manifest of another step": lambda bad, good: shutil.copy(good / "manifest.json", bad / "manifest.json"),
    "manifest of nothing": lambda bad, good: (bad / "manifest.json").write_text('{"step": 2}'),
    "manifest that is no object": lambda bad, good: (bad / "manifest.json").write_text("[1, 2]"),
    "torn manifest": lambda bad, good: (bad / "manifest.json").write_text('{"step": 2, "fi'),
    "files of another under its own manifest's name": lambda bad, good: swap(bad, good),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap(bad: Path, good: Path) -> None:
    shutil.rmtree(bad)
    shutil.copytree(good, bad)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_or_mixed_one_is_never_taken_and_is_told(tmp_path: Path, warnings: list[str], damage: str) -> None:
    good, bad = save_sharded(tmp_path, 1), save_sharded(tmp_path, 2)
    assert checkpoints.newest(tmp_path) == bad
    DAMAGES[damage](bad, good)
    assert checkpoints.newest(tmp_path) == good
    assert torch.equal(states.read_weights(good)["w0"], torch.full((2,), 1.0))
    assert "passing over a bad checkpoint" in warnings[0] and "step-00000002" in warnings[0]
    with pytest.raises(CheckpointError, match="step-00000002"):
        checkpoints.verify(bad)


def test_without_checksums_a_mixed_one_is_read_without_a_word(tmp_path: Path) -> None:
    """The wrong twin: half of the weights are of another step, in files of the right names and sizes."""
    good, bad = save_sharded(tmp_path, 1), save_sharded(tmp_path, 2)
    DAMAGES["shard of another step"](bad, good)
    taken = checkpoints.newest(tmp_path, check=lambda path: checkpoints.verify(path, checksums=False))
    assert taken == bad
    read = states.read_weights(taken)
    assert sorted(value.unique().item() for value in read.values()) == [1.0, 2.0]


def test_a_latest_that_points_to_nothing_is_told_and_not_followed(tmp_path: Path, warnings: list[str]) -> None:
    good, lost = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoints.newest(tmp_path) == lost and not warnings
    shutil.rmtree(lost)
    assert checkpoints.newest(tmp_path) == good
    assert "names step-00000002, which is not there" in warnings[0]


def test_temporary_and_discarded_ones_are_never_taken(tmp_path: Path) -> None:
    """They are whole, and differ from a checkpoint in nothing but their name."""
    good = save(tmp_path, 1)
    for name in (".step-00000002.tmp-1a2b3c4d", ".trash-step-00000003-1a2b3c4d", "step-00000004.bak"):
        shutil.copytree(good, tmp_path / name)
    assert checkpoints.newest(tmp_path) == good
    assert checkpoints.named(tmp_path) == [good]


def test_a_file_that_its_writer_told_of_and_that_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    """Of several ranks one may see less of a shared disk than the others wrote."""
    good = save(tmp_path, 1)
    temporary = checkpoints.begin(tmp_path, 2)
    (temporary / "one").write_bytes(b"1")
    entries = {"two": {"size": 1, "sha256": "0" * 64}}
    with pytest.raises(CheckpointError, match="two is missing"):
        checkpoints.commit(temporary, 2, 1, entries=entries)
    assert checkpoints.newest(tmp_path) == good  # and did not make room
    assert (tmp_path / "LATEST").read_text().strip() == good.name


@given(
    steps=st.lists(st.integers(0, 60), unique=True, max_size=12).map(sorted),
    keep=st.integers(1, 4),
    every=st.none() | st.integers(1, 20),
)
def test_what_makes_room_is_old_and_not_of_the_kept_steps(steps: list[int], keep: int, every: int | None) -> None:
    paths = [Path(checkpoints.name_of(step)) for step in steps]
    gone = [checkpoints.step_of(path) for path in checkpoints.retired(paths, keep, every)]
    stay = [step for step in steps if step not in gone]
    assert stay[-keep:] == steps[-keep:]
    assert all(step in stay for step in steps if every and step % every == 0)
    assert len(stay) == len({*steps[-keep:], *(step for step in steps if every and step % every == 0)})


def test_one_in_so_many_steps_stays_for_ever(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        temporary = checkpoints.begin(tmp_path, step)
        (temporary / checkpoints.STATE).write_bytes(b"weights")
        checkpoints.commit(temporary, step, 1, keep_every_steps=4)
    assert [checkpoints.step_of(path) for path in checkpoints.committed(tmp_path)] == [4, 8, 12]


def test_pruning_counts_the_good_ones_and_never_takes_the_newest_of_them(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, keep=9) for step in range(1, 7)]
    for bad in (paths[1], paths[4], paths[5]):
        (bad / checkpoints.STATE).write_bytes(b"weighty")
    would = checkpoints.prune(tmp_path, 2, dry=True)
    assert [checkpoints.step_of(path) for path in would] == [1, 2]  # 5 and 6 are newer than the newest good one
    assert checkpoints.named(tmp_path) == paths
    assert checkpoints.prune(tmp_path, 1) == paths[:3]
    assert checkpoints.newest(tmp_path) == paths[3]
    (paths[3] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        checkpoints.prune(tmp_path, 1)
    assert paths[3].is_dir()


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
