"""A table of captions: what is drawn depends on the sample alone, the filter throws out what is false and keeps what is
true, a kill changes nothing, and nothing is lost without a word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import _runs
import numpy as np
import pyarrow.parquet as pq
import pytest
from data_fixtures import write_dataset
from recaption_toys import Mute, Oracle, Parrot, caption, mismatched_scenes

from vlm_train.data.recaption_table import SCHEMA, CaptionTable
from vlm_train.errors import DataError

TOYS = Path(__file__).with_name("recaption_toys.py")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mismatched_scenes(tmp_path_factory.mktemp("recaption") / "scenes")


def rows_of(table: Path) -> dict[bytes, dict]:
    parts = sorted(table.glob("part-*.parquet"))
    assert all(pq.read_schema(part).remove_metadata() == SCHEMA for part in parts)
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert len({row["uid"] for row in rows}) == len(rows)
    return {row.pop("uid"): row for row in rows}


def contents(table: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in table.iterdir() if not path.name.startswith(".")}


def test_a_row_has_the_captions_of_its_sample_and_who_wrote_them(shards: Path, tmp_path: Path) -> None:
    found = caption(shards, tmp_path / "table", num_captions=3)
    truth, rows = _runs.truth_of(shards), rows_of(tmp_path / "table")
    assert rows.keys() == truth.keys() and not found.already_there
    for uid, row in rows.items():
        own = list(dict.fromkeys(truth[uid][0]))
        assert row["captions"][: len(own)] == own and len(row["captions"]) == len(own) + 3
        assert row["caption_source"] == ["original"] * len(own) + ["parrot@0123456789abcdef"] * 3
        assert row["caption_scores"] is None
    assert found.facts["num_synthetic"] == 3 * len(truth) and found.facts["num_skipped"] == 0
    assert (tmp_path / "table/errors.jsonl").read_bytes() == b""
    alone = rows_of(caption(shards, tmp_path / "alone", num_captions=3, originals=False).directory)
    assert all(row["captions"] == rows[uid]["captions"][-3:] for uid, row in alone.items())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_what_is_drawn_does_not_depend_on_the_batch(shards: Path, tmp_path: Path, batch_size: int) -> None:
    caption(shards, tmp_path / "one", num_captions=3)
    other = Parrot()
    caption(shards, tmp_path / "two", num_captions=3, batch_size=batch_size, captioner=other)
    assert max(other.sizes) == min(batch_size, 24) and contents(tmp_path / "one") == contents(tmp_path / "two")
    few = np.array([17, 5, 30, 2])
    some = rows_of(caption(shards, tmp_path / "few", rows=few, num_captions=3, batch_size=batch_size).directory)
    whole = rows_of(tmp_path / "one")
    assert len(some) == 4 and all(whole[uid] == row for uid, row in some.items())
    assert rows_of(caption(shards, tmp_path / "seed", num_captions=3, seed=1).directory) != whole


def test_dice_that_the_rows_of_a_batch_share_are_noticed(shards: Path, tmp_path: Path) -> None:
    """The twin: numbers in the order in which they are asked for, as torch's generator gives them."""
    few = np.array([17, 5, 30, 2])
    whole = rows_of(caption(shards, tmp_path / "whole", captioner=Parrot(own_dice=True)).directory)
    some = rows_of(caption(shards, tmp_path / "few", rows=few, captioner=Parrot(own_dice=True)).directory)
    assert any(whole[uid] != row for uid, row in some.items())


def precision_and_recall(table: Path, shards: Path) -> tuple[float, float]:
    """Of the original captions that were kept, how many are true; of those that are true, how many were kept."""
    truth, rows = _runs.truth_of(shards), rows_of(table)
    kept = [
        (uid, text)
        for uid, row in rows.items()
        for text, source in zip(row["captions"], row["caption_source"], strict=True)
        if source == "original"
    ]
    true = [(uid, text) for uid, (own, right) in truth.items() for text in dict.fromkeys(own) if text in right]
    both = len(set(kept) & set(true))
    return both / len(kept), both / len(true)


def test_the_filter_keeps_what_is_true_of_the_picture(shards: Path, tmp_path: Path) -> None:
    share_true = precision_and_recall(caption(shards, tmp_path / "raw").directory, shards)[0]
    assert 0.3 < share_true < 0.7
    found = caption(shards, tmp_path / "table", scorer=Oracle(shards), min_score=0.5)
    assert precision_and_recall(tmp_path / "table", shards) == (1.0, 1.0)
    facts, rows = found.facts, rows_of(tmp_path / "table")
    assert facts["num_synthetic"] == 0 and facts["num_synthetic_dropped"] == len(rows)  # a parrot is never right
    emptied = [row for row in rows.values() if row["captions"] == []]
    assert facts["num_without"] == len(emptied) > 5 and all(row["caption_scores"] == [] for row in emptied)
    assert {score for row in rows.values() for score in row["caption_scores"]} == {np.float32(0.9)}
    caption(shards, tmp_path / "blind", scorer=Oracle(shards, blind=True), min_score=0.5)
    precision, recall = precision_and_recall(tmp_path / "blind", shards)  # the twin does not look
    assert precision < share_true + 0.15 and recall < 0.75


def test_scores_are_kept_without_a_threshold(shards: Path, tmp_path: Path) -> None:
    rows = rows_of(caption(shards, tmp_path / "table", scorer=Oracle(shards)).directory)
    truth = _runs.truth_of(shards)
    for uid, row in rows.items():
        wanted = [0.9 if text in truth[uid][1] else 0.1 for text in row["captions"]]
        assert row["caption_scores"] == pytest.approx(wanted, abs=1e-6)


def test_a_killed_process_goes_on_and_the_table_is_the_same(shards: Path, tmp_path: Path) -> None:
    whole = caption(shards, tmp_path / "whole", num_captions=2).directory
    process = subprocess.Popen([sys.executable, TOYS, shards, tmp_path / "killed", "0.5"])
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/part-00001.parquet").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed/provenance.json").exists()
    with pytest.raises(DataError, match="cannot be read"):
        CaptionTable.load(tmp_path / "killed")  # the twin of a whole one
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("part-*")}
    rest = Parrot()
    caption(shards, tmp_path / "killed", num_captions=2, captioner=rest)
    assert contents(tmp_path / "killed") == contents(whole)
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == when for name, when in first.items())
    assert sum(rest.sizes) == 2 * (len(_runs.truth_of(shards)) - 8 * len(first))
    again = Parrot()
    assert caption(shards, tmp_path / "killed", num_captions=2, captioner=again).already_there and not again.sizes


def test_other_settings_another_process_and_other_files_are_refused(shards: Path, tmp_path: Path) -> None:
    caption(shards, tmp_path / "table", num_captions=2)
    with pytest.raises(DataError, match="other settings") as told:
        caption(shards, tmp_path / "table", num_captions=3)
    assert told.value.got == {"num_captions": 3} and told.value.allowed == {"num_captions": 2}
    caption(shards, tmp_path / "table", num_captions=2, batch_size=5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").touch()
    with pytest.raises(DataError, match="holds no table"):
        caption(shards, tmp_path / "other")
    slow = subprocess.Popen([sys.executable, TOYS, shards, tmp_path / "held", "60"])
    while not (tmp_path / "held/settings.json").exists():
        assert slow.poll() is None
        time.sleep(0.02)
    with pytest.raises(DataError, match="another process"):
        caption(shards, tmp_path / "held", num_captions=2)
    slow.kill()
    slow.wait()


def test_what_cannot_be_captioned_is_told(tmp_path: Path) -> None:
    broken = (3, 20)
    shards = write_dataset(tmp_path / "shards", bad=broken)
    read = Parrot()
    read.shown = lambda image: image.decode().tobytes().hex()  # type: ignore[method-assign]
    found = caption(shards, tmp_path / "table", captioner=read)
    errors = [json.loads(line) for line in (tmp_path / "table/errors.jsonl").read_text().splitlines()]
    assert [error["key"][2:] for error in errors] == [f"{number:04d}" for number in broken]
    assert found.facts["skipped"] == {"image_truncated": 2} and found.facts["num_rows"] == 34
    assert len(CaptionTable.load(tmp_path / "table")) == 34


def test_silence_and_pictures_that_cannot_be_asked_about_are_counted(shards: Path, tmp_path: Path) -> None:
    facts = caption(shards, tmp_path / "table", captioner=Mute(), originals=False).facts
    assert facts["num_empty"] > 10 and facts["num_without"] == facts["num_empty"]
    assert facts["skipped"] == {"an answer does not fit behind its prompt": facts["num_skipped"]}
    assert facts["num_skipped"] + facts["num_empty"] + facts["num_synthetic"] == len(_runs.truth_of(shards))
    with pytest.raises(DataError, match="not one picture"):
        caption(shards, tmp_path / "none", captioner=Parrot(unfit=""))
