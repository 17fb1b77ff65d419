"""A folder of images trained on as it lies there: the samples are those that `data import folder` would write."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import encoded, pixels

from vlm_train.data.decode import SampleError, decode_captions, decode_metadata
from vlm_train.data.importers import import_folder
from vlm_train.data.sources.shards import ShardSource

ROWS = [("a/0.jpg", "zero", 3), ("1.png", "one", None), ("a/0.jpg", "null", None), ("2.jpg", "two", 5)]


def pictures(folder):
    for number, name in enumerate(("a/0.jpg", "1.png", "2.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(pixels(number), "PNG" if name.endswith("png") else "JPEG"))
    return folder


def write_csv(folder):
    lines = [f"{image},{caption},{'' if label is None else label}" for image, caption, label in ROWS]
    (folder / "captions.csv").write_text("\n".join(["image,caption,label", *lines]) + "\n")


def write_jsonl(folder):
    rows = [{"image": image, "caption": caption, "label": label} for image, caption, label in ROWS]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_parquet(folder):
    columns = dict(zip(("image", "caption", "label"), map(list, zip(*ROWS, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "captions.parquet")


def write_texts(folder):
    for image, caption, _ in ROWS:
        with open((folder / image).with_suffix(".txt"), "a") as file:
            file.write(caption + "\n")


def facts(samples):
    found = []
    for sample in samples:
        metadata = decode_metadata(sample.parts)
        found.append((sample.uid, metadata["file"], decode_captions(sample.parts, metadata), metadata.get("label")))
    return found


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet, write_texts])
def test_the_samples_are_those_that_import_would_write(tmp_path, write):
    folder = pictures(tmp_path / "photos")
    write(folder)
    source = ShardSource(shards=str(folder))
    import_folder(folder, tmp_path / "imported")
    imported = ShardSource(shards=str(tmp_path / "imported" / "train"))
    rows = np.arange(len(source))
    assert facts(source.read(rows)) == facts(imported.read(rows))
    labels = [None] * 3 if write is write_texts else [3, None, 5]
    order = dict(zip(("a/0.jpg", "1.png", "2.jpg"), labels, strict=True))
    assert {file: label for _, file, _, label in facts(source.read(rows))} == order


def test_what_cannot_be_used_is_recorded_and_what_changes_is_convicted(tmp_path):
    folder = pictures(tmp_path / "photos")
    (folder / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "outside.jpg").write_bytes(encoded(pixels(7)))
    lines = ["image,caption", "a/0.jpg,zero", "bad.jpg,x", "../outside.jpg,x", "gone.jpg,x", "1.png,one", "2.jpg,two"]
    (folder / "captions.csv").write_text("\n".join(lines))
    source = ShardSource(shards=str(folder))
    assert {(error["key"], error["reason"]) for error in source.manifest.errors()} == {
        ("bad.jpg", "image_unknown"),
        ("../outside.jpg", "outside_folder"),
        ("gone.jpg", "no_image"),
    }
    (folder / "1.png").write_bytes(encoded(pixels(9), "PNG"))
    (folder / "2.jpg").unlink()
    good, other, gone = source.read(np.arange(3))
    assert good.key == "a/0.jpg"
    assert isinstance(other, SampleError) and other.reason == "shard_changed"
    assert isinstance(gone, SampleError) and gone.reason == "no_image"
    (folder / "captions.csv").write_text("image,caption\na/0.jpg,only\n")
    assert len(ShardSource(shards=str(folder))) == 1  # a changed table is indexed again
