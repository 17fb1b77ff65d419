"""`vlm-train data balance` as a user runs it: by a list, by the words of the captions, on any workers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vlm_train.cli.main import main
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection


@pytest.fixture(scope="module")
def shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training scenes, of which nothing is known yet."""
    folder = tmp_path_factory.mktemp("balance") / "train"
    return shutil.copytree(scenes / "train", folder, ignore=shutil.ignore_patterns("_manifest"))


def kept(shards: Path, out: Path) -> tuple[list[str], np.ndarray]:
    """(captions, which stay)."""
    manifest = open_manifest(str(shards))
    return manifest.table(["caption"])["caption"].to_pylist(), Selection.load(out, manifest.fingerprint).mask()


def step_of(out: Path) -> dict[str, Any]:
    (step,) = json.loads((out / "provenance.json").read_text())["steps"]
    return step


def test_colours_are_evened(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours, out = tmp_path / "colours.txt", tmp_path / "out"
    colours.write_text("red\nblue\ngreen\nyellow\nmauve\n")
    words = ["data", "balance", str(shards), "--num-workers", "1", "--entries", str(colours)]
    assert main([*words, "--out", str(out), "--t", "5"]) == 0
    captions, mask = kept(shards, out)
    told = capsys.readouterr().out
    assert f"{mask.sum()} of {len(mask)} samples are kept" in told
    found = [set(caption.lower().split()) & {"red", "blue", "green", "yellow"} for caption in captions]
    before = Counter(word for some in found for word in some)
    after = Counter(word for some, stays in zip(found, mask, strict=True) for word in some if stays)
    assert step_of(out)["facts"]["most_frequent"] == {**before, "mauve": 0}
    assert all(after[word] < before[word] for word in before) and not mask[[not some for some in found]].any()
    values = [row["value"] for row in pq.read_table(out / "dropped.parquet").to_pylist() if row["rule"] == "balance"]
    assert min(values) >= 5
    most = str(max(before.values()))
    assert main([*words, "--out", str(tmp_path / "all"), "--t", most, "--unmatched", "keep"]) == 0
    assert kept(shards, tmp_path / "all")[1].all()


def test_a_share_by_own_words_on_any_workers(shards: Path, tmp_path: Path) -> None:
    words = ["--min-count", "10", "--keep", "0.4", "--seed", "3"]
    masks = []
    for number in ("1", "2"):
        out = tmp_path / number
        assert main(["data", "balance", str(shards), "--out", str(out), "--num-workers", number, *words]) == 0
        masks.append(kept(shards, out)[1])
    facts = step_of(tmp_path / "1")["facts"]
    assert masks[0].sum() == int(0.4 * facts["num_matched"] + 0.5) and np.array_equal(*masks)
    assert (tmp_path / "1" / "dropped.parquet").read_bytes() == (tmp_path / "2" / "dropped.parquet").read_bytes()
    other = tmp_path / "other"  # the twin: other draws
    assert main(["data", "balance", str(shards), "--out", str(other), "--num-workers", "1", *words[:-1], "4"]) == 0
    assert not np.array_equal(kept(shards, other)[1], masks[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min-count", "2", "--t", "3"], "--out"),
        (["--out", "x", "--t", "3"], "either --entries or --min-count"),
        (["--out", "x", "--t", "3", "--entries", "e", "--min-count", "2"], "either --entries or --min-count"),
        (["--out", "x", "--min-count", "2"], "either --t or --keep"),
        (["--out", "x", "--min-count", "2", "--t", "3", "--keep", "0.5"], "either --t or --keep"),
        (["--out", "x", "--min-count", "2", "--keep", "50"], "--keep"),
        (["--out", "x", "--entries", "nowhere.txt", "--t", "3"], "nowhere.txt"),
        (["--out", "x", "--min-count", "99999", "--t", "3"], "lower min_count"),
        (["--out", "x", "--min-count", "2", "--t", "3", "--device", "cpu"], "--device"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, said
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "balance", str(shards), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not (tmp_path / "x" / "selection.npy").exists()
