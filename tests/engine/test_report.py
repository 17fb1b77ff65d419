"""The report tells what the records say, in one file that asks for nothing."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_train.engine.canvas import Canvas
from vlm_train.engine.report import render_report, write_report
from vlm_train.engine.rundir import RunDirectory, append_line

CONFIG: dict[str, Any] = {
    "run": {"experiment": "try <one>", "id": "r1"},
    "seed": 3,
    "model": {"_target_": "a.DualEncoder", "vision": {"_target_": "a.ViT"}, "text": {"_target_": "a.Text"}},
    "objective": {"_target_": "vlm_train.objectives.infonce.InfoNCE"},
    "optim": {"_target_": "a.AdamW", "lr": 0.001},
    "schedule": {"_target_": "a.Cosine"},
    "precision": {"name": "bf16"},
    "trainer": {"max_steps": 10, "global_batch": 32},
    "data": {"train": {"shards": "data/train"}, "val": {"shards": ["data/val"]}, "selection": None},
}
ENVIRONMENT = {
    "num_parameters": 3_640_000, "num_trainable": 3_640_000, "parts": {"vision": 2_000_000, "text": 1_640_000},
    "device": "Some GPU", "num_ranks": 2, "num_cores": 8, "versions": {"torch": "9.9"},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Ten steps, killed after step 5 and resumed from 4, measured at 5 and 10."""
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text(yaml.safe_dump(CONFIG))
    for time, event in ((100, {"event": "start", "step": 0}), (101, {"event": "environment", **ENVIRONMENT}),
                        (130, {"event": "checkpoint", "step": 4}), (1000, {"event": "resume", "step": 4}),
                        (1030, {"event": "finished", "step": 10})):  # fmt: skip
        append_line(run.events, {**event, "time": time})
    for step in range(1, 11):
        append_line(run.metrics, {
            "step": step, "samples": 32 * step, "loss": 4.0 / step, "lr": 0.001, "grad_norm": 1.0, "logit_scale": 14.3,
            "samples_per_second": 100.0, "data_wait": 0.01, "mfu": None,
        })  # fmt: skip
    for step in (5, 10):
        append_line(run.history, {"name": "retrieval", "step": step, "num_pairs": 425, "chance": {"R@1": 0.24},
                                  "text_to_image": {"R@1": 3.5 * step}})  # fmt: skip
    append_line(
        run.data_errors,
        {"split": "train", "step": 2, "shard": "0.tar", "key": "k", "reason": "image_truncated", "detail": "<x>"},
    )
    for name in ("first_batch", "similarity", "retrieval_grid"):
        Canvas(width=40, height=20).save(run.media / f"{name}.png")
    return run


class Requests(HTMLParser):
    """Everything in a document that a browser would fetch, and pictures without words."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [f"{tag} {given[key]}" for key in ("src", "href", "srcset", "data") if key in given]
        self.found += [tag] if tag in ("script", "link", "iframe", "object", "embed") else []
        self.images += [given.get("alt")] if tag == "img" else []


def requests(document: str) -> list[str]:
    parser = Requests()
    parser.feed(document)
    assert all(parser.images)
    styles = re.findall(r"url\(|@import", document)
    return [found for found in parser.found if not found.startswith("img data:image/png;base64,")] + styles


def test_the_file_stands_alone(run: RunDirectory) -> None:
    write_report(run)
    document = run.report.read_text()
    assert requests(document) == [] and document.count("<img") == 3
    assert base64.b64encode((run.media / "similarity.png").read_bytes()).decode() in document
    assert requests('<img alt="a" src="https://x/y.png"><script>1</script>') == ["img https://x/y.png", "script"]


def test_it_says_what_the_records_say(run: RunDirectory) -> None:
    document = render_report(run)
    for expected in ("finished", "3.64 M", "2 x Some GPU, 8 cores", "torch 9.9", "InfoNCE", "ViT (2 M)", "data/val",
                     "35.00", "0.24", "10 of 32 samples", "0.tar", "image_truncated", "resumed after step 4",
                     "1 different samples", "training, replaced", "60 s"):  # fmt: skip
        assert expected in document, expected
    assert "try &lt;one&gt;" in document and "&lt;x&gt;" in document and "<one>" not in document
    assert "Model FLOP utilisation" not in document  # no value was ever known


def test_a_step_that_was_measured_twice_is_told_once(run: RunDirectory) -> None:
    append_line(run.history, {"name": "retrieval", "step": 10, "text_to_image": {"R@1": 77.0}})
    assert "77.00" in render_report(run) and "35.00" not in render_report(run)


@pytest.mark.parametrize(("last", "expected"), [("interrupted", "stopped at step 10 of 10"), ("resume", "unfinished")])
def test_a_run_that_is_not_finished_says_so(run: RunDirectory, last: str, expected: str) -> None:
    append_line(run.events, {"event": last, "time": 2000, "step": 10})
    assert expected in render_report(run)


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    run.config.write_text(yaml.safe_dump(CONFIG))
    document = render_report(run)
    assert "unfinished: step 0 of 10" in document and "Resolved config" in document and "<img" not in document
