"""Tar to beton and back: the same samples, the same bytes where the format has room for them, every loss on record."""

import json

import numpy as np
import pytest
from data_fixtures import encoded, members_of, pixels, write_dataset, write_tar

from vlm_train.data import decode
from vlm_train.data.convert import convert
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError


def samples_of(shards):
    source = ShardSource(shards=str(shards))
    return source.read(np.arange(len(source)))


def test_tar_to_beton_and_back_gives_the_same_samples(tmp_path):
    folder = write_dataset(tmp_path / "tars", (11, 7))
    done = convert(str(folder), tmp_path / "all.beton")
    assert (done.num_written, done.num_pixels, done.num_errors) == (18, 0, 0)
    back = convert(str(tmp_path / "all.beton"), tmp_path / "again", max_samples=11)
    assert back.num_written == 18
    first, second, third = (samples_of(tmp_path / name) for name in ("tars", "all.beton", "again"))
    for one, two, three in zip(first, second, third, strict=True):
        assert (one.uid, one.key, one.parts) == (two.uid, two.key, two.parts) == (three.uid, three.key, three.parts)
    assert sorted(path.name for path in (tmp_path / "again").glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert not list(tmp_path.glob("*.errors.jsonl"))


def test_what_ffcv_cannot_hold_is_kept_as_pixels_and_said(tmp_path):
    array = pixels(3)
    write_tar(tmp_path / "a.tar", [*members_of("jpg", 1), ("png.png", encoded(array, "PNG")), ("png.txt", b"a png")])
    done = convert(str(tmp_path / "a.tar"), tmp_path / "a.beton")
    assert (done.num_written, done.num_pixels) == (2, 1)
    assert (decode.open_image(samples_of(tmp_path / "a.beton")[1].parts["ppm"]).decode() == array).all()
    convert(str(tmp_path / "a.beton"), tmp_path / "back")
    back = samples_of(tmp_path / "back")[1]
    assert (decode.open_image(back.parts["png"]).decode() == array).all() and back.parts["txt"] == b"a png"


def test_a_bad_sample_is_recorded_and_the_rest_is_written(tmp_path):
    folder = write_dataset(tmp_path / "tars", (9,), bad=(2, 5))
    for out in (tmp_path / "a.beton", tmp_path / "b"):
        done = convert(str(folder), out)
        assert (done.num_written, done.num_errors) == (7, 2)
        errors = [json.loads(line) for line in done.errors.read_text().splitlines()]
        assert [(error["shard"], error["key"], error["reason"]) for error in errors] == [
            ("00000.tar", "000002", "image_truncated"),
            ("00000.tar", "000005", "image_truncated"),
        ]
        assert [sample.key for sample in samples_of(out)] == [f"00000{i}" for i in (0, 1, 3, 4, 6, 7, 8)]


def test_only_what_a_selection_keeps(tmp_path):
    folder = write_dataset(tmp_path / "tars", (9,))
    manifest = ShardSource(shards=str(folder)).fingerprint
    Selection.from_mask(np.arange(9) % 3 == 0, manifest=manifest).save(tmp_path / "third")
    convert(str(folder), tmp_path / "a.beton", selection=tmp_path / "third")
    assert [sample.key for sample in samples_of(tmp_path / "a.beton")] == ["000000", "000003", "000006"]


def test_nothing_is_overwritten_and_nothing_half_done_is_left(tmp_path):
    folder = write_dataset(tmp_path / "tars", (3,), bad=(0, 1, 2))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for out in (tmp_path / "there", tmp_path / "there" / "file"):
        with pytest.raises(DataError, match="is there already"):
            convert(str(folder), out)
    with pytest.raises(DataError, match="no"):
        convert(str(folder), tmp_path / "a.beton")
    assert not (tmp_path / "a.beton").exists() and (tmp_path / "a.beton.errors.jsonl").read_text().count("\n") == 3
