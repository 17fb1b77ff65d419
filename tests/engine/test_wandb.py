"""W&B as a mirror of a run's folder: real offline runs, read back record by record; a run that goes on sends nothing
twice."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from vlm_train.engine.rundir import RunDirectory, append_line
from vlm_train.engine.wandb import WandbSink, begin, replay, scores_by_step
from vlm_train.errors import ConfigError

BLOCK = 32768


def records(path: Path) -> Iterator[Record]:
    """Of a .wandb file: blocks of LevelDB's log (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last)."""
    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if kind == 0:
            break
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that W&B holds, of the one offline run of a folder."""
    deadline = time.monotonic() + 20
    while not (files := list(folder.glob("wandb/offline-run-*/run-*.wandb"))) and time.monotonic() < deadline:
        time.sleep(0.05)  # a process of W&B's own writes it, and may be behind
    (file,) = files
    rows = []
    for record in records(file):
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


def offline(run: RunDirectory) -> Any:
    return begin(run, project="p", entity=None, mode="offline", run_id="run-1", config={"optim": {"lr": 0.25}})


def test_a_folder_becomes_one_offline_run_however_often(run: RunDirectory) -> None:
    for _ in range(2):
        assert replay(run, offline(run)) == 4
    rows = [row for row in history(run.path) if "loss" in row]
    assert [(row["_step"], row["marker"]) for row in rows] == [(step, f"row-{step}") for step in range(1, 5)]
    assert rows[-1]["eval/retrieval/text_to_image/R@1"] == 12.5 and rows[-1]["eval/step"] == 4
    assert any(key.startswith("media/grid") for key in rows[-1])


class There:
    """Of a W&B run what is used here."""

    def __init__(self, step: int) -> None:
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
