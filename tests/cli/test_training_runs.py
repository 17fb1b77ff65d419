"""Real runs in real processes: killed, interrupted, resumed, on one rank and two, and what users see of bad data."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import _runs
import pytest

DDP = ("trainer.devices=2", "strategy=ddp")


def words(data: Path, run: Path, *extra: str, max_steps: int = 24) -> list[str]:
    return _runs.train_words(
        data, f"trainer.max_steps={max_steps}", "checkpoint.every_steps=5", f"run.dir={run}", *extra
    )


FP64 = ("precision=fp64",)
MACHINES = {
    "one": (),
    "two": DDP,
    "fp64": FP64,
    "fp64-two": (*FP64, *DDP),
    "fp64-micro": (*FP64, "trainer.micro_batch=9"),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Callable[[str], Path]:
    """The run that nobody interrupts on one of MACHINES, or with another seed ("other"); each made once."""
    folder = tmp_path_factory.mktemp("untouched")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            _runs.call(folder, words(scenes, folder / name, *MACHINES.get(name, ("seed=1",))))
        return folder / name

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "kills"), [("one", (3, 12, 21)), ("two", (12,)), ("fp64", (12,))])
def test_a_killed_run_tells_the_story_of_an_untouched_one(
    tmp_path: Path, scenes: Path, untouched: Callable[[str], Path], machine: str, kills: tuple[int, ...]
) -> None:
    """The short form of scripts/proof/kill_resume.py. The control has another seed."""
    killed, command = tmp_path / "killed", words(scenes, tmp_path / "killed", *MACHINES[machine])
    for step in kills:
        _runs.kill_after(tmp_path, command, killed, step)
    _runs.call(tmp_path, command)
    assert _runs.learned(killed) == _runs.learned(untouched(machine)) != _runs.learned(untouched("other"))
    assert [row["step"] for row in _runs.rows(killed)] == list(range(1, 25))


@pytest.mark.slow
def test_one_process_two_processes_and_micro_batches_learn_the_same(untouched: Callable[[str], Path]) -> None:
    """The short form of scripts/proof/topology.py; fp64, 24 steps: measured differences up to 5e-15."""
    losses = {name: _runs.losses(untouched(name)) for name in MACHINES}
    assert losses["fp64-two"] == pytest.approx(losses["fp64"], abs=1e-12)
    assert losses["fp64-micro"] == pytest.approx(losses["fp64"], abs=1e-12)
    assert losses["one"] != pytest.approx(losses["fp64"], abs=1e-12)  # the twin: another arithmetic is seen


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(tmp_path: Path, scenes: Path, untouched: Callable[[str], Path]) -> None:
    _runs.call(tmp_path, words(scenes, tmp_path / "compiled", "compile=blocks"))
    losses = _runs.losses(tmp_path / "compiled")
    assert losses == pytest.approx(_runs.losses(untouched("one")), abs=1e-3)
    assert losses != pytest.approx(_runs.losses(untouched("other")), abs=1e-3)  # the twin


@pytest.mark.slow
@pytest.mark.parametrize("machine", [(), DDP], ids=["one-process", "two-processes"])
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path, scenes: Path, machine: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    command = words(scenes, run, *machine, max_steps=200)
    assert _runs.signal_after(tmp_path, command, run, 3, signal.SIGINT) == 130
    stopped_at = _runs.last_step(run)
    assert (run / "checkpoints" / "LATEST").read_text().strip() == f"step-{stopped_at:08d}"
    assert _runs.signal_after(tmp_path, command, run, stopped_at + 1, signal.SIGTERM) == 143
    assert [row["step"] for row in _runs.rows(run)] == list(range(1, _runs.last_step(run) + 1))
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events.count("interrupted") == 2 and events.count("resume") == 1


def test_a_dead_launcher_takes_its_ranks_with_it(tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    _runs.kill_after(tmp_path, words(scenes, run, *DDP, max_steps=2000), run, 2)
    marker = str(run)
    for _ in range(50):
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if marker not in listing:
            break
        signal.sigtimedwait([], 0.1)
    assert marker not in listing


def test_a_second_command_does_not_train_the_same_run(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_train.cli import runs
    from vlm_train.engine.rundir import RunDirectory
    from vlm_train.errors import ConfigError

    run = RunDirectory(tmp_path / "run")
    monkeypatch.setattr(runs._acquire, "__defaults__", (0.3,))
    with runs.locked(run), pytest.raises(ConfigError, match="another process"), runs.locked(run):
        pass


def test_resuming_with_another_recipe_is_refused_and_names_the_key(tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    _runs.call(tmp_path, words(scenes, run, max_steps=5))
    output = _runs.call(tmp_path, words(scenes, run, "optim.lr=0.5", max_steps=5), expect=2)
    assert "optim.lr: 0.001 -> 0.5" in output
    assert "finished already" in _runs.call(tmp_path, words(scenes, run, "data.num_workers=0", max_steps=5))


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path: Path, scenes: Path) -> None:
    """Files of at most 150 kB stand in for a full disk: the state does not fit, everything else does."""
    run = tmp_path / "run"
    _runs.signal_after(tmp_path, words(scenes, run), run, 7, signal.SIGKILL)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # noqa: E731
    process = _runs.start(
        tmp_path, words(scenes, run), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limit
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "checkpoint of step 10 could not be written" in output and "remedy" in output and "Traceback" not in output
    assert (run / "checkpoints" / "LATEST").read_text().strip() == "step-00000005"
    assert not list((run / "checkpoints").glob(".step*"))
    _runs.call(tmp_path, words(scenes, run))
    assert _runs.last_step(run) == 24


@pytest.fixture
def damaged(tmp_path: Path, scenes: Path) -> Path:
    """A writable copy of the scenes without its manifests."""
    copy = tmp_path / "damaged"
    shutil.copytree(scenes, copy)
    for manifest in copy.rglob("_manifest"):
        shutil.rmtree(manifest)
    return copy


def test_a_missing_shard_is_named(tmp_path: Path, scenes: Path) -> None:
    pattern = f"data.train.shards={scenes}/train/{{00000..00002}}.tar"
    output = _runs.call(tmp_path, words(scenes, tmp_path / "run", pattern), expect=2)
    assert "00001.tar" in output and "missing" in output and "Traceback" not in output


def test_an_empty_tar_is_named(tmp_path: Path, damaged: Path) -> None:
    (damaged / "train" / "00001.tar").write_bytes(b"\0" * 10240)
    output = _runs.call(tmp_path, words(damaged, tmp_path / "run"), expect=2)
    assert "00001.tar" in output and "Traceback" not in output


def test_bad_samples_are_replaced_counted_and_recorded(tmp_path: Path, damaged: Path) -> None:
    """A picture with a hole and a caption that is not UTF-8: neither ends the run, both are in data_errors.jsonl."""
    shard = damaged / "train" / "00000.tar"
    content = bytearray(shard.read_bytes())
    picture = content.index(b"\x89PNG")
    content[picture + 60 : picture + 200] = bytes(140)
    next_picture = content.index(b"\x89PNG", picture + 300)
    text = (content.index(b".txt\0", next_picture) // 512 + 1) * 512
    content[text : text + 2] = b"\xff\xfe"
    shard.write_bytes(content)
    run = tmp_path / "run"
    _runs.call(tmp_path, words(damaged, run, "data.max_error_rate=0.1"))
    errors = [json.loads(line) for line in (run / "data_errors.jsonl").read_text().splitlines()]
    assert all({"step", "split", "shard", "key", "reason"} <= error.keys() for error in errors)
    assert [error["step"] for error in errors if "utf" in error["reason"].lower()] == [0]
    assert len([error for error in errors if error["step"] > 0]) >= 2  # met again in each epoch
    assert len(_runs.rows(run)) == 24
    output = _runs.call(tmp_path, words(damaged, tmp_path / "strict", "data.max_error_rate=0", max_steps=40), expect=2)
    assert "bad samples" in output and "00000.tar" in output


def test_what_no_selection_can_hold_does_not_count_against_one(tmp_path: Path, damaged: Path) -> None:
    """Indexing leaves a caption out that is not UTF-8; the twin without a selection is refused."""
    shard = damaged / "train" / "00000.tar"
    content = bytearray(shard.read_bytes())
    text = (content.index(b".txt\0") // 512 + 1) * 512
    content[text : text + 2] = b"\xff\xfe"
    shard.write_bytes(content)
    _runs.call(tmp_path, ["data", "select", str(damaged / "train"), "--where", "width > 0", "--out", "chosen"])
    assert "bad samples" in _runs.call(tmp_path, words(damaged, tmp_path / "all", "data.max_error_rate=0"), expect=2)
    _runs.call(tmp_path, words(damaged, tmp_path / "run", "data.max_error_rate=0", "data.selection=chosen"))
    assert json.loads((tmp_path / "run" / "data_errors.jsonl").read_text())["key"]


def test_runs_of_one_command_in_one_folder(tmp_path: Path, scenes: Path) -> None:
    """Without a name: an unfinished run goes on, a finished one is left alone and a new one starts."""
    command = [word for word in words(scenes, Path("x"), max_steps=30) if not word.startswith("run.dir")]
    latest = tmp_path / "runs" / "default" / "latest"
    _runs.kill_after(tmp_path, command, latest, 7)
    first = os.readlink(latest)
    assert "nowhere" in _runs.call(tmp_path, [*command, "seed=1", "data.selection=nowhere"], expect=2)
    assert os.readlink(latest) == first  # what is refused does not come before what runs
    _runs.call(tmp_path, command)
    assert os.readlink(latest) == first and _runs.last_step(latest) == 30
    _runs.call(tmp_path, [*command, "trainer.max_steps=2", "schedule.warmup_steps=1"])
    assert os.readlink(latest) != first
