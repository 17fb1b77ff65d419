"""`vlm-train data dedup` as a user runs it: killed, on any workers, by its looks and by a model, and trained on."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_train.cli.main import main
from vlm_train.curation import columns, semantic
from vlm_train.curation.engines import Local
from vlm_train.data.gallery import ShardGallery
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection
from vlm_train.data.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

NUM_COPIES = 40


@pytest.fixture(scope="module")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training scenes in shards of 32, the first of them twice: as they are, and smaller; then one that does not
    decode."""
    folder, gallery = tmp_path_factory.mktemp("twice"), ShardGallery(shards=str(scenes / "train"))
    pictures = [resized(gallery.open(number).decode(), 128) for number in range(len(gallery))]
    smaller = [resized(pixels, 100) for pixels in pictures]
    contents = [encoded(pixels) for pixels in [*pictures, *pictures[:NUM_COPIES], *smaller[:NUM_COPIES]]]
    with DatasetWriter(folder / "all", parameters={}, max_samples=32) as writer:
        for number, content in enumerate([*contents, contents[0][:-60]]):
            writer.add("train", f"{number:05d}", {"png": content, "txt": f"scene {number}".encode()})
        writer.finish(num_errors=0, facts={})
    return folder / "all" / "train"


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def written(shards: Path, out: Path) -> dict[str, bytes]:
    """All that the command leaves, byte for byte."""
    parts = sorted((shards / "_manifest").glob("*.parquet"))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in [*parts, *files]}


def fresh(data: Path, folder: Path) -> Path:
    """The same shards, of which nothing is known yet."""
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("_manifest"))
    return folder


def test_copies_are_dropped_and_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = fresh(data, tmp_path / "shards"), tmp_path / "out"
    assert main(["data", "dedup", str(shards), "--out", str(out)]) == 0
    told, manifest = capsys.readouterr().out, open_manifest(str(shards))
    num = len(manifest)
    selection = Selection.load(out, manifest.fingerprint)
    facts = selection.provenance["steps"][0]["num_dropped"]
    assert facts["exact"] == NUM_COPIES and facts["near"] == NUM_COPIES
    assert f"{num - sum(facts.values())} of {num} samples are kept" in told and f"data.selection={out}" in told
    keys = manifest.table(["key"])["key"].to_pylist()
    key_of = dict(zip(manifest.uids().tobytes().hex("-", 16).split("-"), keys, strict=True))
    rows = pq.read_table(out / "dropped.parquet").to_pylist()
    first = num - 1 - 2 * NUM_COPIES
    for row in rows:
        number, of = (int(key_of[row[name].hex()]) for name in ("uid", "like"))
        assert keys[row["row"]] == f"{number:05d}"
        scene = (number - first) % NUM_COPIES if number >= first else number
        assert of in (scene, first + scene)  # the largest: not one of the smaller ones
        assert row["rule"] == ("near" if number >= first + NUM_COPIES else "exact") and row["step"] == "copies"
    quality = manifest.table(["quality"])["quality"].to_pylist()
    assert quality[-1] is None and selection.mask()[-1]  # it does not decode, which is for `verify` to say
    assert None not in quality[:-1]


def test_any_workers_and_any_kills_leave_the_same_bytes(data: Path, tmp_path: Path) -> None:
    whole = fresh(data, tmp_path / "whole")
    assert main(["data", "dedup", str(whole), "--out", str(tmp_path / "one"), "--num-workers", "1"]) == 0
    expected = written(whole, tmp_path / "one")
    killed, out = fresh(data, tmp_path / "killed"), tmp_path / "two"
    code = f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r}); import slowly; slowly.main()"
    random, num_killed, seen = np.random.default_rng(0), 0, set()
    command = [sys.executable, "-c", code, "data", "dedup", str(killed), "--out", str(out), "--num-workers", "1"]
    for _ in range(4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and num_finished(killed) <= len(seen) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(float(random.uniform(0, 0.3)))
        num_killed += process.poll() is None
        process.kill()
        process.wait()
        seen.add(num_finished(killed))
    assert num_killed >= 2 and len(seen) > 1  # in the middle, and not always at the same place
    assert main(["data", "dedup", str(killed), "--out", str(out), "--num-workers", "2"]) == 0
    assert written(killed, out) == expected
    # the twin: another radius is another selection
    assert main(["data", "dedup", str(killed), "--out", str(tmp_path / "other"), "--radius", "0"]) == 0
    assert written(killed, tmp_path / "other") != expected


def num_finished(shards: Path) -> int:
    """Parts that have fingerprints."""
    return sum(columns.has_columns(part, columns.FINGERPRINT) for part in (shards / "_manifest").glob("*.parquet"))


def test_a_new_version_of_fingerprints_is_made_anew(data: Path, tmp_path: Path) -> None:
    shards = fresh(data, tmp_path / "shards")
    manifest = open_manifest(str(shards))
    columns.add_columns(manifest, columns.FINGERPRINT, engine=Local(num_workers=1))
    before = [part.stat().st_mtime_ns for part in manifest.parts]
    columns.add_columns(manifest, columns.FINGERPRINT, engine=Local(num_workers=1))
    assert [part.stat().st_mtime_ns for part in manifest.parts] == before
    newer = replace(columns.FINGERPRINT, version="0")
    columns.add_columns(manifest, newer, engine=Local(num_workers=1))
    after = [part.stat().st_mtime_ns for part in manifest.parts]
    assert all(old < new for old, new in zip(before, after, strict=True))
    assert open_manifest(str(shards)).fingerprint == manifest.fingerprint
    assert main(["data", "verify", str(shards)]) == 0


def test_a_model_drops_what_means_the_same_and_training_takes_it(
    scenes: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("trainer.max_steps=8", "trainer.accelerator=cpu", "data.num_workers=0", "evaluation=none")
    _runs.call(tmp_path, _runs.train_words(scenes, "run.dir=run", *few))
    common = ["data", "dedup", str(data), "--run", "run", "--device", "cpu", "--num-workers", "1"]
    kept, of_dropped, num = {}, {}, len(open_manifest(str(data)))
    for name, extra in {"fine": ["--eps", "1e-6"], "paper": ["--eps", "1e-3", "--rule", "paper"],
                        "leader": ["--eps", "1e-3"]}.items():  # fmt: skip
        assert main([*common, "--out", name, *extra]) == 0
        told = capsys.readouterr().out
        facts = json.loads((tmp_path / name / "provenance.json").read_text())
        kept[name] = facts["num_kept"]
        assert f"{kept[name]} of {num} samples are kept" in told
        rows = [
            row for row in pq.read_table(tmp_path / name / "dropped.parquet").to_pylist() if row["rule"] == "semantic"
        ]
        assert len(rows) == facts["steps"][1]["num_dropped"].get("semantic", 0)
        assert all(row["value"] > 1 - facts["steps"][1]["settings"]["eps"] for row in rows)
        dropped = {row["uid"] for row in rows}
        of_dropped[name] = sum(row["like"] in dropped for row in rows)
    assert of_dropped["leader"] == 0 < of_dropped["paper"]
    assert kept["paper"] <= kept["leader"] < kept["fine"] <= num - 2 * NUM_COPIES + 2
    # another eps is read from what was stored: nothing is compared again
    with monkeypatch.context() as patched:
        patched.setattr(semantic, "nearest_of", None)
        assert main([*common, "--out", "paper", "--eps", "1e-6", "--rule", "paper"]) == 0
    assert main([*common, "--out", "fresh", "--eps", "1e-6", "--rule", "paper"]) == 0
    paper, fresh = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in ("paper", "fresh")
    )
    assert paper == fresh and "similarities.parquet" in fresh
    words = _runs.train_words(scenes, "run.dir=after", f"data.train.shards={data}", "data.selection=fine", *few)
    _runs.call(tmp_path, words)
    rows = _runs.rows(tmp_path / "after")
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out"),
        (["--out", "x", "--eps", "0.1"], "--eps is about embeddings"),
        (["--out", "x", "--run", "none", "--eps", "0.1"], "none"),
        (["--out", "x", "--run", "none"], "--eps"),
        (["--out", "x", "--radius", "17"], "--radius"),
        (["--out", "x", "--selection", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, said
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "dedup", str(data), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not (tmp_path / "x").exists()
