"""W&B as a mirror of a run's folder: real offline runs, read back record by record; a run that goes on sends nothing
twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

import vlm_train
from vlm_train.engine.rundir import RunDirectory, append_line
from vlm_train.engine.wandb import WandbSink, begin, replay, scores_by_step
from vlm_train.engine.wandb_files import LONGEST, REFUSED, id_of, num_rows, records
from vlm_train.errors import ConfigError


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that W&B holds, of the one offline run of a folder."""
    deadline = time.monotonic() + 20
    while not (files := list(folder.glob("wandb/offline-run-*/run-*.wandb"))) and time.monotonic() < deadline:
        time.sleep(0.05)  # a process of W&B's own writes it, and may be behind
    (file,) = files
    rows = []
    for content in records(file):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture(autouse=True)
def _no_service_is_left() -> Iterator[None]:
    """W&B's process of this one would serve the processes that later tests start."""
    yield
    wandb.teardown()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Four steps, a score, a picture."""
    run = RunDirectory(tmp_path / "run-1")
    run.create()
    for step in range(1, 5):
        append_line(run.metrics, {"step": step, "loss": 0.5 / step, "marker": f"row-{step}"})
    append_line(run.history, {"step": 4, "name": "retrieval", "text_to_image": {"R@1": 12.5}, "num_pairs": 8})
    Image.new("RGB", (4, 4)).save(run.media / "grid.png")
    return run


def offline(run: RunDirectory, *, project: str = "p", run_id: str = "run-1") -> Any:
    return begin(run, project=project, entity=None, mode="offline", run_id=run_id, config={"optim": {"lr": 0.25}})


def test_a_folder_becomes_one_offline_run_however_often(run: RunDirectory) -> None:
    for _ in range(2):
        assert replay(run, offline(run)) == 4
    rows = [row for row in history(run.path) if "loss" in row]
    assert [(row["_step"], row["marker"]) for row in rows] == [(step, f"row-{step}") for step in range(1, 5)]
    assert rows[-1]["eval/retrieval/text_to_image/R@1"] == 12.5 and rows[-1]["eval/step"] == 4
    assert any(key.startswith("media/grid") for key in rows[-1])
    assert [path.name for path in run.path.glob(".*")] == []


IDS = st.text(max_size=40) | st.text(alphabet=REFUSED + " ab\n\udcff", max_size=300)


@given(IDS, IDS)
def test_an_id_that_wandb_refuses_becomes_one_that_it_takes(first: str, second: str) -> None:
    for run_id in (first, second):
        found = id_of(run_id)
        assert wandb.Settings(run_id=found).run_id == found == id_of(run_id)
        assert not set(found) & set(REFUSED) and len(found.encode()) <= LONGEST
        assert id_of(found) == found
    assert id_of(first) != id_of(second) or first == second


def test_an_id_that_wandb_takes_stays() -> None:
    assert id_of("20261129-120000-ab12") == "20261129-120000-ab12" and id_of("00-lr=0.1 ä") == "00-lr=0.1 ä"
    assert id_of("a:b") == f"a-b-{hashlib.sha256(b'a:b').hexdigest()[:8]}"


def test_a_run_with_such_a_name_is_written(run: RunDirectory) -> None:
    for _ in range(2):
        assert replay(run, offline(run, run_id="mine: [1]/2")) == 4
    assert len([row for row in history(run.path) if "loss" in row]) == 4


def test_a_folder_that_cannot_be_written_anew_stays(run: RunDirectory) -> None:
    """A wrong project, and a disk that is full after 8 kB: of the latter W&B itself says nothing."""
    replay(run, offline(run))
    (good,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    assert num_rows(good) == 4
    before = good.read_bytes()
    with pytest.raises(ConfigError, match="Invalid project name") as caught:
        offline(run, project="a/b")
    assert "login" not in str(caught.value) and caught.value.remedy == "logger.project=NAME"
    assert good.read_bytes() == before and not list(run.path.glob(".wandb-*"))
    for step in range(5, 200):
        append_line(run.metrics, {"step": step, "loss": 0.5 / step})
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.wandb import begin, replay
run = RunDirectory({str(run.path)!r})
replay(run, begin(run, project="p", entity=None, mode="offline", run_id="run-1", config={{}}))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(vlm_train.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "W&B has not written the whole run" in done.stderr, done.stderr
    assert good.read_bytes() == before and not list(run.path.glob(".wandb-*"))
    assert replay(run, offline(run)) == 199 and not good.exists()  # the twin: with room the new one takes its place


def test_a_file_in_the_place_of_the_folder(run: RunDirectory) -> None:
    (run.path / "wandb").write_text("mine")
    with pytest.raises(ConfigError, match="File exists") as caught:
        offline(run)
    assert "login" not in str(caught.value) and str(run.path / "wandb") in str(caught.value)


@pytest.mark.parametrize("mode", ["", "later"])
def test_what_the_environment_says_of_wandb(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """An empty variable says nothing; a wrong one is named."""
    monkeypatch.setenv("WANDB_MODE", mode)
    wandb.teardown()  # it reads the environment once a process
    if mode:
        with pytest.raises(ConfigError, match="did not start") as caught:
            offline(run)
        assert caught.value.got == "WANDB_MODE=later" and caught.value.remedy == "unset WANDB_MODE"
    else:
        assert replay(run, offline(run)) == 4


class There:
    """Of a W&B run what is used here."""

    def __init__(self, step: int) -> None:
        self.offline, self.dir = False, "."
        self.step, self.id, self.sent, self.alerts, self.summary = step, "run-1", [], [], {}  # type: ignore[var-annotated]

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        self.sent.append((step, row))

    def alert(self, title: str, text: str) -> None:
        self.alerts.append(title)

    def finish(self) -> None:
        self.step = -1


def test_what_the_server_has_is_not_sent_again(run: RunDirectory) -> None:
    """A life was killed behind step 2 of which W&B has heard; the next one trains steps 2 to 4."""
    there = There(step=3)
    sink = WandbSink(run, there)
    for step in range(2, 5):
        sink({"step": step, "loss": 0.0})
    assert [step for step, _ in there.sent] == [3, 4]
    later = There(step=3)
    assert replay(run, later) == 2 and [step for step, row in later.sent if "loss" in row] == [3, 4]
    assert replay(run, There(step=0)) == 4  # the twin: a server that has nothing


def test_alerts_and_scores_of_a_run_that_trains(run: RunDirectory) -> None:
    append_line(run.events, {"event": "rewind", "time": 1.0, "step": 2})  # of an earlier life: told already
    there = There(step=5)
    sink = WandbSink(run, there)
    run.event("checkpoint", {"step": 6})
    run.event("rewind", {"step": 7})
    append_line(run.history, {"step": 7, "name": "retrieval", "text_to_image": {"R@1": 25.0}})
    sink.close()
    assert there.alerts == ["run-1: spike"] and there.step == -1
    assert [row for _, row in there.sent if "eval/step" in row] == [
        {"eval/retrieval/text_to_image/R@1": 25.0, "eval/step": 7}
    ]
    assert there.summary["eval/retrieval/text_to_image/R@1"] == 25.0
    assert scores_by_step(run)[4]["eval/retrieval/num_pairs"] == 8


def test_online_without_a_login_is_a_clear_error(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no terminal to ask for one, and a server that cannot be reached."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    wandb.teardown()  # it reads the environment once a process
    with pytest.raises(ConfigError, match="Weights & Biases did not start") as caught:
        begin(run, project="p", entity=None, mode="online", run_id="run-2", config={})
    assert "logger.mode=offline" in str(caught.value)
