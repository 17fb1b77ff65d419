"""A folder of images trained on as it lies there: the samples are those that `data import folder` would write."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import encoded, pixels
from promptly import promptly

from vlm_train.data.decode import SampleError, decode_captions, decode_metadata
from vlm_train.data.importers import import_folder
from vlm_train.data.records import Record, image_files, read_record
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError

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


def loop(path):
    path.symlink_to(path.name)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 31)


ODDITIES = [
    ("b.png", os.mkfifo, "unreadable"),
    ("b.txt", os.mkfifo, "unreadable"),
    ("b.png", os.mkdir, "unreadable"),
    ("b.txt", os.mkdir, "unreadable"),
    ("b.png", loop, "unreadable"),
    ("b.txt", loop, "unreadable"),
    ("b.png", lambda path: path.symlink_to("/dev/null"), "unreadable"),
    ("b.png", lambda path: path.symlink_to("gone.png"), "no_image"),
    ("b.txt", lambda path: path.symlink_to("gone.txt"), "no_caption"),
    ("b.png", sparse, "sample_too_large"),
    ("b.txt", sparse, "sample_too_large"),
]


@pytest.mark.parametrize(("name", "make", "reason"), ODDITIES, ids=range(len(ODDITIES)))
def test_what_is_no_file_costs_its_sample_alone(tmp_path, name, make, reason):
    folder = pictures(tmp_path / "photos")
    write_texts(folder)
    (folder / "b.png").write_bytes(encoded(pixels(4), "PNG"))
    (folder / "b.txt").write_text("four")
    (folder / name).unlink()
    make(folder / name)
    with promptly():
        source = ShardSource(shards=str(folder))
        done = import_folder(folder, tmp_path / "imported")
    assert [(error["key"], error["reason"]) for error in source.manifest.errors()] == [("b.png", reason)]
    assert len(source) == 3
    assert (done.num_samples, done.facts["errors"]) == ({"train": 3}, {reason: 1})


@pytest.mark.parametrize("name", ["c" * 300 + ".png", "1.png/x", "gone.png"])
def test_a_name_that_no_file_has_is_no_image(tmp_path, name):
    folder = pictures(tmp_path / "photos")
    rows = [{"image": "1.png", "caption": "one"}, {"image": name, "caption": "none"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    errors = ShardSource(shards=str(folder)).manifest.errors()
    assert [(error["key"], error["reason"]) for error in errors] == [(name, "no_image")]
    assert import_folder(folder, tmp_path / "imported").facts["errors"] == {"no_image": 1}


def test_a_name_that_is_not_utf8_is_read_and_shown(tmp_path):
    folder = pictures(tmp_path / "photos")
    write_texts(folder)
    for name, content in ((b"\xff.png", encoded(pixels(4), "PNG")), (b"\xff.txt", b"four"), (b"\xfe.jpg", b"none")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    source = ShardSource(shards=str(folder))
    import_folder(folder, tmp_path / "imported")
    imported = ShardSource(shards=str(tmp_path / "imported" / "train"))
    assert facts(source.read(np.arange(4))) == facts(imported.read(np.arange(4)))
    (sample,) = (sample for sample in source.read(np.arange(4)) if sample.parts["txt"] == b"four")
    assert sample.key == decode_metadata(sample.parts)["file"] == "\\udcff.png"
    assert [(error["key"], error["reason"]) for error in source.manifest.errors()] == [("\\udcfe.jpg", "no_caption")]


@pytest.mark.parametrize("make", [os.mkfifo, loop])
def test_a_table_that_is_no_file_is_an_error(tmp_path, make):
    folder = pictures(tmp_path / "photos")
    write_texts(folder)
    make(folder / "captions.csv")
    with promptly(), pytest.raises(DataError, match=r"captions\.csv cannot be read"):
        import_folder(folder, tmp_path / "imported")
    with promptly(), pytest.raises(DataError, match=r"captions\.csv cannot be read"):
        ShardSource(shards=str(folder))


def test_a_folder_that_cannot_be_listed_is_recorded(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "photos")
    write_texts(folder)
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(folder / "a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    done = import_folder(folder, tmp_path / "imported")
    assert (done.num_samples, done.facts["errors"]) == ({"train": 2}, {"unreadable": 1})


def test_images_lie_at_any_depth(tmp_path):
    folders = [tmp_path]
    for _ in range(1200):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    image = folders[-1] / "x.JPG"
    image.touch()
    try:
        assert image_files(tmp_path) == [image]
    finally:  # who cleans up later walks by recursion
        image.unlink()
        for folder in folders[:0:-1]:
            folder.rmdir()


@pytest.mark.parametrize(
    "change", [b"[]", b'{"file": 5, "captions": ["x"]}', b'{"file": "1.png", "captions": [5]}', b""]
)
def test_records_that_indexing_did_not_write_are_convicted(tmp_path, change):
    folder = pictures(tmp_path / "photos")
    write_texts(folder)
    source = ShardSource(shards=str(folder))
    (path,) = (folder / "_manifest").glob("*.records")
    first = path.read_bytes().index(b"\n")
    path.write_bytes(change.ljust(first) + path.read_bytes()[first:])
    changed, *others = source.read(np.arange(3))
    assert changed.reason == "shard_changed"
    assert len([sample for sample in others if not isinstance(sample, SampleError)]) == 2


def test_a_table_cannot_point_outside(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(pixels(1), "PNG"))
    (tmp_path / "photos").mkdir()
    for name in ("../x.png", str(tmp_path / "x.png"), "a/../../x.png"):
        assert read_record(Record(name, ["x"]), tmp_path / "photos") == "outside_folder"
