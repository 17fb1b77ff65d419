"""`vlm-train data prune` as a user runs it: by rules, by captions, by a model, on any workers, and trained on."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vlm_train.cli.main import main
from vlm_train.data.decode import decode_captions, decode_metadata
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

FEW = ("trainer.max_steps=8", "trainer.accelerator=cpu", "data.num_workers=0", "evaluation=none")


@pytest.fixture(scope="module")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training scenes in shards of 64, with one more whose caption is the name of a file."""
    folder, source = tmp_path_factory.mktemp("pairs"), ShardSource(shards=str(scenes / "train"))
    with DatasetWriter(folder / "all", parameters={}, max_samples=64) as writer:
        samples = source.read(np.arange(len(source)))
        for number, sample in enumerate([*samples, samples[0]]):
            caption = decode_captions(sample.parts, decode_metadata(sample.parts))[0]
            text = "IMG_0042.jpg" if number == len(source) else caption
            picture = next(content for name, content in sample.parts.items() if name in ("png", "jpg", "webp"))
            writer.add("train", f"{number:05d}", {"png": picture, "txt": text.encode()})
        writer.finish(num_errors=0, facts={})
    return folder / "all" / "train"


@pytest.fixture(scope="module")
def model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contrastive run of a few steps."""
    folder = tmp_path_factory.mktemp("model")
    _runs.call(folder, _runs.train_words(scenes, "run.dir=run", *FEW))
    return folder / "run"


def written(shards: Path, out: Path) -> dict[str, bytes]:
    """All that the command leaves but embeddings, byte for byte."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and "embeddings" not in path.parts)
    return {path.name: path.read_bytes() for path in [*sorted((shards / "_manifest").glob("*.parquet")), *files]}


def steps_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "provenance.json").read_text())["steps"]


def captions_of(shards: Path) -> list[str]:
    return open_manifest(str(shards)).table(["caption"])["caption"].to_pylist()


def test_rules_and_caps(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    words = ["--forms", "file_name", "--min-words", "8", "--max-aspect", "3", "--max-per-caption", "1"]
    assert main(["data", "prune", str(data), "--out", str(out), "--num-workers", "1", *words]) == 0
    told, manifest = capsys.readouterr().out, open_manifest(str(data))
    captions, mask = captions_of(data), Selection.load(out, manifest.fingerprint).mask()
    assert [step["step"] for step in steps_of(out)] == ["images", "captions", "caption_copies"]
    rules = [row["rule"] for row in pq.read_table(out / "dropped.parquet").to_pylist()]
    assert f"{mask.sum()} of {len(mask)} samples are kept" in told and f"data.selection={out}" in told
    assert not mask[captions.index("IMG_0042.jpg")]
    assert rules.count("min_words") == sum(len(caption.split()) < 8 for caption in captions)
    assert rules.count("file_name") == 0  # it breaks the rule before
    kept = [caption for caption, stays in zip(captions, mask, strict=True) if stays]
    assert len(kept) == len(set(kept)) and min(len(caption.split()) for caption in kept) >= 8
    fresh = shutil.copytree(data, tmp_path / "fresh", ignore=shutil.ignore_patterns("_manifest"))
    assert main(["data", "prune", str(fresh), "--out", str(again), "--num-workers", "2", *words]) == 0
    assert written(data, out) == written(fresh, again)
    # the twin: another rule is another selection
    assert main(["data", "prune", str(fresh), "--out", str(again), "--num-workers", "1", "--min-words", "9"]) == 0
    assert written(data, out) != written(fresh, again)


def test_patterns_and_a_preset(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patterns, out = tmp_path / "patterns.txt", tmp_path / "out"
    patterns.write_text("(?i)^img_\n\\bblue\\b\n")
    assert main(["data", "prune", str(data), "--out", str(out), "--num-workers", "1", "--patterns", str(patterns)]) == 0
    captions = captions_of(data)
    expected = sum("blue" in caption.split() for caption in captions) + 1
    assert steps_of(out)[0]["num_dropped"]["patterns"] == expected
    capsys.readouterr()
    words = ["--preset", "datacomp-basic", "--min-side", "16", "--num-workers", "1"]
    assert main(["data", "prune", str(data), "--out", str(tmp_path / "preset"), *words]) == 0
    images, rules = (step["settings"] for step in steps_of(tmp_path / "preset"))
    assert images == {"min_side": 16, "max_aspect": 3.0}  # what is given goes before the preset
    assert (rules["min_words"], rules["min_chars"], rules["languages"]) == (3, 6, ["en"])
    assert "caption_language" in open_manifest(str(data)).table().column_names
    assert main(["data", "verify", str(data)]) == 0


def test_a_model_scores_and_thins_out_and_training_takes_it(
    scenes: Path, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    num = len(open_manifest(str(data)))
    common = ["data", "prune", str(data), "--run", str(model), "--device", "cpu", "--num-workers", "1"]
    assert main([*common, "--out", "kept", "--keep", "0.3"]) == 0
    (score,) = steps_of(tmp_path / "kept")
    half_up = int(0.3 * num + 0.5)
    assert score["num_dropped"] == {"keep": num - half_up}
    rows = pq.read_table("kept/dropped.parquet").to_pylist()
    limit = max(row["value"] for row in rows)
    assert main([*common, "--out", "least", "--min-score", str(limit + 1e-9)]) == 0
    least, shares = (np.load(tmp_path / name / "selection.npy") for name in ("least", "kept"))
    assert np.array_equal(least, shares)  # there are no ties
    assert main([*common, "--out", "both", "--keep", "0.5", "--density", "0.5", "--min-words", "2"]) == 0
    names = [step["step"] for step in steps_of(tmp_path / "both")]
    assert names == ["captions", "score", "density"]
    after = num - 1
    for step in steps_of(tmp_path / "both")[1:]:
        assert step["num_before"] == after
        after = int(after / 2 + 0.5)
        assert sum(step["num_dropped"].values()) == step["num_before"] - after
    words = _runs.train_words(scenes, "run.dir=after", f"data.train.shards={data}", "data.selection=both", *FEW)
    _runs.call(tmp_path, words)
    assert len(_runs.rows(tmp_path / "after")) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out"),
        (["--out", "x"], "nothing is said"),
        (["--out", "x", "--keep", "0.3"], "--keep is what a model says"),
        (["--out", "x", "--density", "0.3"], "--density is what a model says"),
        (["--out", "x", "--run", "none"], "--run has nothing to do"),
        (["--out", "x", "--run", "none", "--keep", "0.3"], "none"),
        (["--out", "x", "--run", "r", "--keep", "0.3", "--min-score", "0.2"], "two limits of one score"),
        (["--out", "x", "--min-words", "2", "--device", "cpu"], "--device"),
        (["--out", "x", "--min-words", "2", "--similarity", "0.9"], "--max-per-caption"),
        (["--out", "x", "--min-words", "3", "--max-words", "2"], "nothing could stay"),
        (["--out", "x", "--min-letters", "50"], "--min-letters"),
        (["--out", "x", "--languages", "english"], "--languages"),
        (["--out", "x", "--forms", "urls"], "--forms url"),
        (["--out", "x", "--preset", "laion"], "datacomp-basic"),
        (["--out", "x", "--patterns", "nowhere.txt"], "nowhere.txt"),
        (["--out", "x", "--min-word", "2"], "--min-words"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, said
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prune", str(data), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not (tmp_path / "x").exists()
