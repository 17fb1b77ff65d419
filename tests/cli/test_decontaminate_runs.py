"""`vlm-train data decontaminate` as a user runs it: planted leaks are told, flagged, and dropped where asked."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_train.cli.main import main
from vlm_train.data.gallery import ShardGallery
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection
from vlm_train.data.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

QUESTION = "is the thing that hangs over the left door of the old house a red lamp"
NUM_LEAKED = 5


@pytest.fixture(scope="module")
def leaky(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training scenes; of the benchmark `first` there are 5 samples as they are and 5 smaller ones, and of `second` one
    question of 15 words, upper case and with other signs."""
    folder = tmp_path_factory.mktemp("leaky")
    ours, theirs = (ShardGallery(shards=str(scenes / split)) for split in ("train", "val"))
    own = [resized(ours.open(row).decode(), 128) for row in range(60)]
    benchmark = [resized(theirs.open(row).decode(), 128) for row in range(20)]
    smaller = [resized(pixels, 100) for pixels in benchmark[NUM_LEAKED : 2 * NUM_LEAKED]]
    write(folder / "first", benchmark, ["what is this?"] * 20)
    write(folder / "second", [np.full((64, 64, 3), 20 * row, np.uint8) for row in range(3)], ["a", QUESTION, "b"])
    captions = [f"scene {row}" for row in range(60)]
    captions[7] = f"- {QUESTION.upper()}?!"
    write(folder / "ours", [*own, *benchmark[:NUM_LEAKED], *smaller], [*captions, *["leaked"] * 2 * NUM_LEAKED])
    return folder


def write(folder: Path, pictures: list[np.ndarray], captions: list[str]) -> None:
    with DatasetWriter(folder, parameters={}, max_samples=25) as writer:
        for number, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            writer.add("train", f"{number:05d}", {"png": file.getvalue(), "txt": caption.encode()})
        writer.finish()


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def test_leaks_are_told_flagged_and_dropped_by_rule(
    leaky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = str(leaky / "ours" / "train")
    against = [f"--against=first={leaky / 'first' / 'train'}", f"--against=second={leaky / 'second' / 'train'}"]
    assert main(["data", "decontaminate", ours, *against, "--out", "flagged"]) == 0
    told, manifest = capsys.readouterr().out, open_manifest(ours)
    assert Selection.load("flagged", manifest.fingerprint).content.num_kept() == len(manifest)  # nothing without --drop
    assert "first" in told and "contaminated_by" in told
    facts = json.loads(Path("flagged/provenance.json").read_text())["steps"][0]["facts"]["benchmarks"]
    assert facts["first"] == {
        "num_samples": 20, "num_hit": 2 * NUM_LEAKED, "num_flagged": {"exact": NUM_LEAKED, "near": NUM_LEAKED}
    }  # fmt: skip
    assert facts["second"] == {"num_samples": 3, "num_hit": 1, "num_flagged": {"text": 1}}
    flags = manifest.table(["contaminated_by"])["contaminated_by"].to_pylist()
    assert flags == [None] * 7 + ["second"] + [None] * 52 + ["first"] * 2 * NUM_LEAKED
    hits = pq.read_table("flagged/hits.parquet").to_pylist()
    first = open_manifest(str(leaky / "first" / "train"))
    uids, theirs = manifest.uids().tolist(), first.uids().tolist()
    places = {(uids.index(list(hit["uid"])), theirs.index(list(hit["hit"]))) for hit in hits if hit["rule"] != "text"}
    assert places == {(60 + row, row) for row in range(2 * NUM_LEAKED)}
    assert main(["data", "decontaminate", ours, *against, "--out", "dropped", "--drop", "exact,text"]) == 0
    kept = Selection.load("dropped", manifest.fingerprint).mask()
    assert np.flatnonzero(~kept).tolist() == [7, *range(60, 60 + NUM_LEAKED)]
    assert main(["data", "select", ours, "--where", "contaminated_by IS NULL", "--out", "clean"]) == 0
    assert Selection.load("clean", manifest.fingerprint).content.num_kept() == 59


def test_what_another_command_overwrote_is_found_again(
    leaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, manifest = str(leaky / "ours" / "train"), open_manifest(str(leaky / "ours" / "train"))
    first, second = (f"--against={name}={leaky / name / 'train'}" for name in ("first", "second"))

    def flags(*words: str) -> list[str | None]:
        assert main(["data", "decontaminate", ours, *words]) == 0
        return manifest.table(["contaminated_by"])["contaminated_by"].to_pylist()

    told = flags(first, "--out", "one")
    assert flags(second, "--out", "two") != told == flags(first, "--out", "one")
    Path("one/hits.parquet").unlink()
    before = [part.stat().st_mtime_ns for part in manifest.parts]
    assert flags(first, "--out", "one") == told and Path("one/hits.parquet").is_file()
    after = [part.stat().st_mtime_ns for part in manifest.parts]
    assert flags(first, "--out", "one") == told and before != after  # all of it is there: nothing is done again
    assert [part.stat().st_mtime_ns for part in manifest.parts] == after


def test_a_model_finds_them_and_order_decides_nothing(
    leaky: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("trainer.max_steps=8", "trainer.accelerator=cpu", "data.num_workers=0", "evaluation=none")
    _runs.call(tmp_path, _runs.train_words(scenes, "run.dir=run", *few))
    model = ["--run", "run", "--device", "cpu", "--num-words", "0", "--drop", "model", "--num-workers", "1"]
    words = ["data", "decontaminate", "--against", f"first={leaky / 'first' / 'train'}", *model]
    found = {}
    shards = [str(leaky / "ours" / "train" / f"{shard:05d}.tar") for shard in range(3)]
    for name, order, cosine in (
        ("one", [0, 1, 2], "0.99999"),
        ("two", [2, 0, 1], "0.99999"),
        ("all", [0, 1, 2], "1e-6"),
    ):
        some = [shards[number] for number in order]
        assert main([*words[:2], *some, *words[2:], "--min-cosine", cosine, "--out", name]) == 0
        table = pq.read_table(f"{name}/hits.parquet").to_pylist()
        found[name] = sorted((hit["uid"], hit["hit"], hit["value"]) for hit in table if hit["rule"] == "model")
    assert found["one"] == found["two"]
    assert (
        NUM_LEAKED <= len(found["one"]) < len(found["all"]) == 60 + 2 * NUM_LEAKED
    )  # next to 0 flags all: a threshold counts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "benchmarks to look for"),
        (["--against", "coco"], "NAME=SHARDS"),
        (["--against", "coco=nowhere"], "nowhere"),
        (["--against", "coco=HERE", "--drop", "looks"], "--drop"),
        (["--against", "coco=HERE", "--run", "r"], "min_cosine"),
        (["--against", "coco=HERE", "--min-cosine", "0.5"], "min_cosine"),
        (["--against", "co co=HERE"], "co co"),
        (["--against", "coco=HERE", "--drop", "model"], "nothing can be dropped"),
        (["--against", "coco=HERE", "--drop", "text", "--num-words", "0"], "nothing can be dropped"),
        (["--against", "coco=HERE", "--device", "cpu"], "--device"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    leaky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, said
) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(leaky / "second" / "train")
    words = [word.replace("HERE", here) for word in words]
    assert main(["data", "decontaminate", str(leaky / "ours" / "train"), *words, "--out", "x"]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not (tmp_path / "x").exists()
