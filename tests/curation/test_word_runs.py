"""Runs of words that two datasets share: against a reading of the rule with sets of strings."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import word_runs
from vlm_train.curation.engines import Local
from vlm_train.curation.texts import normalised
from vlm_train.data.indexing import open_manifest
from vlm_train.data.manifest import Manifest
from vlm_train.data.writer import DatasetWriter
from vlm_train.errors import DataError

PNG = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
ENGINE = Local(num_workers=1)
TEXTS = st.lists(st.sampled_from(["a", "B", "c,", "D.", "a-b"]), min_size=1, max_size=9).map(" ".join)


def dataset(folder: Path, texts: list[str], max_samples: int = 3) -> Manifest:
    """A dataset without pictures worth the name, in shards of three."""
    with DatasetWriter(folder, parameters={}, max_samples=max_samples) as writer:
        for number, text in enumerate(texts):
            writer.add("train", f"{number:04d}", {"png": PNG, "txt": text.encode()})
        writer.finish()
    return open_manifest(str(folder / "train"))


def shared(ours: list[str], theirs: list[str], length: int) -> dict[int, int]:
    """row -> the first row of the others with one of its runs."""
    split = [[" ".join(run) for run in zip(*(words[start:] for start in range(length)), strict=False)]
             for words in (normalised(text).split() for text in theirs)]  # fmt: skip
    found = {}
    for row, text in enumerate(ours):
        words = normalised(text).split()
        runs = {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}
        holding = [min(other for other, known in enumerate(split) if run in known)
                   for run in runs if any(run in known for known in split)]  # fmt: skip
        if holding:
            found[row] = min(holding)
    return found


@settings(max_examples=15, deadline=None)
@given(ours=st.lists(TEXTS, min_size=1, max_size=7), theirs=st.lists(TEXTS, min_size=1, max_size=5))
def test_runs_are_found_as_sets_of_strings_find_them(
    ours: list[str], theirs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    manifest, benchmark = dataset(folder / "ours", ours), dataset(folder / "theirs", theirs)
    for length in (1, 3):
        runs = word_runs.runs_of(benchmark, length, engine=ENGINE)
        pairs = word_runs.shared_with(manifest, runs, length, engine=ENGINE, file=folder / "x" / "runs.bin")
        assert dict(pairs.tolist()) == shared(ours, theirs, length)


def test_dialogues_are_read_and_short_texts_leak_nothing(tmp_path: Path) -> None:
    question = "how many red squares are left of the large green triangle in this picture?"
    turns = [{"role": "user", "content": f"<image> {question.upper()}"}, {"role": "assistant", "content": "two"}]
    with DatasetWriter(tmp_path / "ours", parameters={}) as writer:
        writer.add("train", "0", {"png": PNG, "txt": b"two"})
        writer.add("train", "1", {"png": PNG, "txt": b"no", "json": json.dumps({"conversations": turns}).encode()})
        writer.add("train", "2", {"png": PNG, "txt": b"a picture"})
        writer.finish()
    manifest = open_manifest(str(tmp_path / "ours" / "train"))
    benchmark = dataset(tmp_path / "theirs", ["two", "a picture", question])
    runs = word_runs.runs_of(benchmark, 13, engine=ENGINE)
    pairs = word_runs.shared_with(manifest, runs, 13, engine=ENGINE, file=tmp_path / "runs.bin")
    assert pairs.tolist() == [[1, 2]] and not (tmp_path / "runs.bin").exists()
    # the twin: runs of one word make of every "a picture" a leak
    runs = word_runs.runs_of(benchmark, 1, engine=ENGINE)
    pairs = word_runs.shared_with(manifest, runs, 1, engine=ENGINE, file=tmp_path / "runs.bin")
    assert np.unique(pairs[:, 0]).tolist() == [0, 1, 2]


def test_a_shard_that_is_not_there_is_no_shard_without_leaks(tmp_path: Path) -> None:
    texts = ["a b c d", "e f g h"]
    manifest, benchmark = dataset(tmp_path / "ours", texts), dataset(tmp_path / "theirs", texts)
    runs = word_runs.runs_of(benchmark, 3, engine=ENGINE)
    shared = partial(word_runs.shared_with, manifest, runs, 3, engine=ENGINE, file=tmp_path / "runs.bin")
    assert len(shared()) == 2
    changed = dataset(tmp_path / "changed", ["other words", "in their place"])
    Path(manifest.shards[0]).write_bytes(Path(changed.shards[0]).read_bytes())
    with pytest.raises(DataError, match="indexed anew"):
        shared()
    Path(manifest.shards[0]).unlink()
    with pytest.raises(DataError):
        shared()
