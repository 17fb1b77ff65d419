"""Copies of checkpoints in a store: complete or none, kept as the folder is, and brought back as they were."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from vlm_train.engine import checkpoints
from vlm_train.engine.copies import Copies, Store, restore
from vlm_train.engine.rundir import RunDirectory, append_line
from vlm_train.errors import CheckpointError, ConfigError


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path / 'store'}"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    made.config.write_text("seed: 1")
    (made.tokenizer / "deep").mkdir(parents=True)
    (made.tokenizer / "deep" / "merges.txt").write_text("a b")
    return made


def save(run: RunDirectory, step: int, content: bytes = b"weights", keep: int = 2) -> Path:
    temporary = checkpoints.begin(run.checkpoints, step)
    (temporary / checkpoints.STATE).mkdir()
    (temporary / checkpoints.STATE / "__0_0.distcp").write_bytes(content + bytes([step]))
    append_line(run.metrics, {"step": step})
    return checkpoints.commit(temporary, step, keep)


def copies_of(run: RunDirectory, url: str, keep: int = 2) -> Copies:
    return Copies(run=run, store=Store(url, "mine"), keep=keep, keep_every_steps=None)


def elsewhere(run: RunDirectory) -> RunDirectory:
    """The run on a machine that has nothing of it."""
    other = RunDirectory(run.path.with_name(f"other-{uuid.uuid4().hex[:4]}"))
    other.create()
    return other


def test_a_run_without_a_folder_goes_on_from_the_newest_copy(run: RunDirectory, url: str) -> None:
    copies = copies_of(run, url)
    for step in (5, 10, 15):
        save(run, step)
        copies.update()
    assert copies.store.steps() == ["step-00000010", "step-00000015"]  # as the folder has
    other = elsewhere(run)
    found = restore(other, copies.store)
    assert found == other.checkpoints / "step-00000015" == checkpoints.newest(other.checkpoints)
    for name in ("config.yaml", "metrics.jsonl", "tokenizer/deep/merges.txt"):
        assert (other.path / name).read_bytes() == (run.path / name).read_bytes()
    assert [json.loads(line)["step"] for line in run.events.read_text().splitlines()] == [5, 10, 15]
    assert restore(elsewhere(run), Store(url, "another")) is None


@pytest.mark.parametrize("name", ["state.ckpt/__0_0.distcp", "manifest.json", "run.json", "run/config.yaml"])
@pytest.mark.parametrize("damage", [b"", b"another", None], ids=["empty", "other", "missing"])
def test_a_torn_copy_is_passed_over(run: RunDirectory, url: str, name: str, damage: bytes | None) -> None:
    copies = copies_of(run, url)
    for step in (5, 10):
        save(run, step)
        copies.update()
    system, root = fsspec.core.url_to_fs(url)
    place = f"{root}/mine/step-00000010/{name}"
    if damage is None:
        system.rm_file(place)
    else:
        system.pipe_file(place, damage)
    other = elsewhere(run)
    assert restore(other, copies.store) == other.checkpoints / "step-00000005"
    assert [path.name for path in other.checkpoints.iterdir()] == ["step-00000005"]
    system.rm_file(f"{root}/mine/step-00000005/run.json")
    with pytest.raises(CheckpointError, match=r"no copy in .* verifies"):
        restore(elsewhere(run), copies.store)


def test_steps_that_were_taken_back_are_taken_back_there(run: RunDirectory, url: str) -> None:
    copies = copies_of(run, url)
    for step in (5, 10):
        save(run, step)
    copies.update()
    checkpoints.retire_after(run.checkpoints, 5)
    copies.update()
    assert copies.store.steps() == ["step-00000005"]
    save(run, 10, b"learned anew")
    copies.update()
    other = elsewhere(run)
    found = restore(other, copies.store)
    assert found is not None
    assert (found / checkpoints.STATE / "__0_0.distcp").read_bytes() == b"learned anew\n"


class Broken(Store):
    """A store that is away until `is_there`."""

    is_there = False

    def put(self, file: Path, name: str) -> None:
        if not self.is_there:
            raise ConnectionError("s3://someone:secret@host/x does not answer")
        super().put(file, name)


def test_a_store_that_is_away_is_told_and_tried_again(
    run: RunDirectory, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("vlm_train.engine.copies.LOG.warning", lambda message, *words: told.append(message % words))
    store = Broken(url, "mine")
    copies = Copies(run=run, store=store, keep=2, keep_every_steps=None)
    save(run, 5)
    copies.start()
    copies.wait(30)
    assert store.steps() == [] and "is tried again after the next save" in told[0]
    store.is_there = True
    save(run, 10)
    copies.start()
    copies.wait(30)
    assert store.steps() == ["step-00000005", "step-00000010"] and len(told) == 1


def test_a_name_that_leads_elsewhere_is_not_followed(run: RunDirectory, url: str) -> None:
    copies = copies_of(run, url)
    save(run, 5)
    copies.update()
    listing = {"../../escaped": {"size": 1, "sha256": "0"}}
    copies.store.write("step-00000005/run.json", json.dumps(listing).encode())
    with pytest.raises(CheckpointError, match="outside its folder"):
        restore(elsewhere(run), copies.store)
    assert not list(run.path.parent.rglob("escaped"))


def test_an_unknown_kind_of_store_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.copy_to cannot be opened") as raised:
        Store("s5://someone:secret@bucket/folder", "mine")
    assert "secret" not in str(raised.value)


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
