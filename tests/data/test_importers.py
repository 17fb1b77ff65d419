"""Importers keep the bytes, keep every caption, and lose nothing without saying so."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vlm_train.data.importers import import_coco, import_folder
from vlm_train.data.records import image_suffix
from vlm_train.errors import DataError


def image(seed: int, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def put(folder: Path, name: str, content: bytes | str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(folder: Path) -> dict[str, dict]:
    """Samples by the name that the file had before the import."""
    found: dict[str, dict] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, part = member.name.split(".", 1)
                found.setdefault(key, {})[part] = tar.extractfile(member).read()
    samples = list(found.values())
    for sample in samples:
        sample["json"] = json.loads(sample["json"])
    return {sample["json"]["file"]: sample for sample in samples}


def errors_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "import_errors.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", None)])
def test_the_format_is_read_from_the_bytes(kind, suffix):
    assert image_suffix(image(0, kind)) == suffix
    assert image_suffix(b"") is None


def test_folder_with_text_files(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    put(folder, "a.jpg", image(1))
    put(folder, "a.txt", "a red circle\n\n a circle \n")
    put(folder, "deep/er/b.PNG", image(2, "PNG"))
    put(folder, "deep/er/b.txt", "ein grüner Stern")
    put(folder, "wrong name.jpg", image(3, "WEBP"))
    put(folder, "wrong name.txt", "a webp")
    put(folder, "alone.jpg", image(4))
    put(folder, "blank.jpg", image(5))
    put(folder, "blank.txt", " \n")
    put(folder, "latin.jpg", image(6))
    put(folder, "latin.txt", "café".encode("latin-1"))
    put(folder, "fake.jpg", "this is no picture")
    put(folder, "fake.txt", "a fake")
    put(folder, "notes.md", "not ours")
    summary = import_folder(folder, out)
    samples = read(out / "train")
    assert set(samples) == {"a.jpg", "deep/er/b.PNG", "wrong name.jpg"}
    assert samples["a.jpg"]["jpg"] == image(1)  # the bytes as they were
    assert samples["a.jpg"]["json"]["captions"] == ["a red circle", "a circle"]
    assert samples["a.jpg"]["txt"] == b"a red circle"
    assert samples["deep/er/b.PNG"]["png"] == image(2, "PNG")
    assert samples["deep/er/b.PNG"]["txt"].decode() == "ein grüner Stern"
    assert "webp" in samples["wrong name.jpg"]
    assert {(row["file"], row["reason"]) for row in errors_of(out)} == {
        ("alone.jpg", "no_caption"),
        ("blank.jpg", "no_caption"),
        ("latin.jpg", "caption_utf8"),
        ("fake.jpg", "image_unknown"),
    }
    assert summary.num_errors == 4
    assert summary.facts["errors"] == {"caption_utf8": 1, "image_unknown": 1, "no_caption": 2}
    assert summary.num_samples == {"train": 3}


ROWS = [
    {"image": "x.jpg", "caption": "first, with a comma", "label": "3"},
    {"image": "sub/y.jpg", "caption": 'a "quoted" word', "label": ""},
    {"image": "x.jpg", "caption": "second\nline", "label": "3"},
    {"image": "gone.jpg", "caption": "missing", "label": "1"},
    {"image": "../outside.jpg", "caption": "elsewhere", "label": "1"},
]


def write_table(path: Path) -> None:
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, ["image", "caption", "label"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_folder_with_a_table(tmp_path, ending):
    folder, out = tmp_path / "in", tmp_path / "out"
    put(folder, "x.jpg", image(1))
    put(folder, "sub/y.jpg", image(2))
    put(tmp_path, "outside.jpg", image(3))
    write_table(folder / f"captions.{ending}")
    import_folder(folder, out)
    samples = read(out / "train")
    assert set(samples) == {"x.jpg", "sub/y.jpg"}
    assert samples["x.jpg"]["json"] == {
        "captions": ["first, with a comma", "second\nline"],
        "label": 3,
        "file": "x.jpg",
    }
    assert "label" not in samples["sub/y.jpg"]["json"]
    assert samples["sub/y.jpg"]["json"]["captions"] == ['a "quoted" word']
    reasons = {row["file"]: row["reason"] for row in errors_of(out)}
    assert reasons == {"gone.jpg": "no_image", "../outside.jpg": "outside_folder"}


def test_bad_rows_are_listed(tmp_path):
    put(tmp_path, "in/x.jpg", image(1))
    rows = [
        {"image": "x.jpg", "caption": "fine", "label": "cat"},
        {"image": "x.jpg", "caption": None},
        {"image": None, "caption": "whose?"},
        {"image": "half.jpg", "caption": "half a pair \ud800"},
    ]
    put(tmp_path, "in/captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert import_folder(tmp_path / "in", tmp_path / "out").num_samples == {"train": 1}
    assert [row["reason"] for row in errors_of(tmp_path / "out")] == ["bad_label", "bad_row", "bad_row", "caption_utf8"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "txt"])
def test_a_line_separator_inside_a_caption_is_no_end_of_a_line(tmp_path, ending):
    caption = "one\u2028caption\x85here"
    put(tmp_path, "in/a.jpg", image(1))
    if ending == "txt":
        put(tmp_path, "in/a.txt", f"\ufeff{caption}\r\nanother")
    elif ending == "csv":
        put(tmp_path, "in/captions.csv", f"image,caption\r\na.jpg,{caption}\r\na.jpg,another\r\n")
    else:
        rows = [json.dumps({"image": "a.jpg", "caption": text}, ensure_ascii=False) for text in (caption, "another")]
        put(tmp_path, "in/captions.jsonl", "\n".join(rows))
    import_folder(tmp_path / "in", tmp_path / "out")
    assert read(tmp_path / "out/train")["a.jpg"]["json"]["captions"] == [caption, "another"]


def test_two_tables_are_one_too_many(tmp_path):
    put(tmp_path, "in/captions.csv", "image,caption\n")
    put(tmp_path, "in/captions.json", "[]")
    with pytest.raises(DataError, match="several caption tables"):
        import_folder(tmp_path / "in", tmp_path / "out")


def test_nothing_to_import_is_an_error_and_can_be_mended(tmp_path):
    put(tmp_path, "in/captions.csv", "image,caption\na.jpg,one\nb.jpg,two\n")
    with pytest.raises(DataError, match="no image of") as caught:
        import_folder(tmp_path / "in", tmp_path / "out")
    assert caught.value.got == {"no_image": 2}
    assert len(errors_of(tmp_path / "out")) == 2
    put(tmp_path, "in/a.jpg", image(1))
    assert import_folder(tmp_path / "in", tmp_path / "out").num_samples == {"train": 1}
    with pytest.raises(DataError, match="no such folder"):
        import_folder(tmp_path / "nowhere", tmp_path / "out2")


def test_val_is_drawn_by_the_picture_so_that_equal_pictures_stay_together(tmp_path):
    for number in range(200):
        put(tmp_path, f"in/{number:03d}.jpg", image(number // 2))
        put(tmp_path, f"in/{number:03d}.txt", f"caption {number}")
    summary = import_folder(tmp_path / "in", tmp_path / "out", val_fraction=0.3)
    train, val = ({s["jpg"] for s in read(tmp_path / "out" / split).values()} for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 100
    assert 30 <= summary.num_samples["val"] <= 90  # 60 expected, standard deviation 9


def test_again_is_a_no_op_until_the_folder_changes(tmp_path):
    put(tmp_path, "in/a.jpg", image(1))
    put(tmp_path, "in/a.txt", "one")
    assert not import_folder(tmp_path / "in", tmp_path / "out").already_there
    assert import_folder(tmp_path / "in", tmp_path / "out").already_there
    put(tmp_path, "in/a.txt", "another")
    with pytest.raises(DataError, match="other parameters"):
        import_folder(tmp_path / "in", tmp_path / "out")


def coco(tmp_path: Path) -> Path:
    document = {
        "info": {},
        "licenses": [{"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}],
        "images": [
            {"id": 10 + n, "file_name": f"00000{n}.jpg", "license": 4, "coco_url": f"http://images/{n}.jpg", "width": 9}
            for n in range(3)
        ],
        "annotations": [{"id": n, "image_id": 10 + n % 3, "caption": f"caption {n} "} for n in range(15)]
        + [{"id": 99, "image_id": 77, "caption": "of no image"}],
    }
    for n in range(2):
        put(tmp_path, f"images/00000{n}.jpg", image(n))
    put(tmp_path, "captions_val2017.json", json.dumps(document))
    return tmp_path / "captions_val2017.json"


def test_official_coco(tmp_path):
    out = tmp_path / "out"
    summary = import_coco(coco(tmp_path), tmp_path / "images", out, split="val")
    assert summary.num_samples == {"val": 2}
    samples = read(out / "val")
    assert samples["000001.jpg"]["jpg"] == image(1)
    assert samples["000001.jpg"]["json"] == {
        "captions": ["caption 1", "caption 4", "caption 7", "caption 10", "caption 13"],
        "image_id": 11,
        "source": "coco",
        "license": "Attribution License",
        "url": "http://images/1.jpg",
        "file": "000001.jpg",
    }
    assert errors_of(out) == [{"file": "77", "reason": "unknown_image"}, {"file": "000002.jpg", "reason": "no_image"}]


def karpathy(tmp_path: Path) -> Path:
    splits = ["train", "restval", "val", "test", "train"]
    images = [
        {
            "filepath": "train2014" if n % 2 == 0 else "val2014",
            "filename": f"COCO_{n}.jpg",
            "imgid": n,
            "split": split,
            "cocoid": 100 + n,
            "sentids": [5 * n + k for k in range(5)],
            "sentences": [{"raw": f"Sentence {k} of {n}.", "tokens": ["sentence"], "imgid": n} for k in range(5)],
        }
        for n, split in enumerate(splits)
    ]
    for row in images:
        put(tmp_path, f"images/{row['filepath']}/{row['filename']}", image(row["imgid"]))
    put(tmp_path, "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    return tmp_path / "dataset_coco.json"


def test_karpathy_splits(tmp_path):
    path = karpathy(tmp_path)
    assert import_coco(path, tmp_path / "images", tmp_path / "all").num_samples == {"test": 1, "train": 3, "val": 1}
    (sample,) = read(tmp_path / "all/val").values()
    assert sample["json"]["captions"] == [f"Sentence {k} of 2." for k in range(5)]
    assert sample["json"]["image_id"] == 102
    assert sample["jpg"] == image(2)
    only = import_coco(path, tmp_path / "images", tmp_path / "only", split="restval")
    assert only.num_samples == {"train": 1}
    with pytest.raises(DataError, match="unknown split") as caught:
        import_coco(path, tmp_path / "images", tmp_path / "bad", split="dev")
    assert "restval" in str(caught.value.allowed)


def test_karpathy_with_all_images_in_one_folder(tmp_path):
    path = karpathy(tmp_path)
    flat = tmp_path / "flat"
    for source in (tmp_path / "images").glob("*/*.jpg"):
        put(flat, source.name, source.read_bytes())
    assert sum(import_coco(path, flat, tmp_path / "out").num_samples.values()) == 5


@pytest.mark.parametrize("content", ["[]", "{}", "{broken", '{"images": []}', '{"images": [{"id": 1}]}'])
def test_a_file_that_is_not_coco_is_an_error(tmp_path, content):
    put(tmp_path, "x.json", content)
    with pytest.raises(DataError, match="not a COCO caption file"):
        import_coco(tmp_path / "x.json", tmp_path, tmp_path / "out")
