"""Tar to beton and back: the same samples, the same bytes where the format has room for them, every loss on record."""

import json
import tarfile

import numpy as np
import pytest
from data_fixtures import encoded, members_of, pixels, write_dataset, write_tar
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.data import convert as module
from vlm_train.data import decode
from vlm_train.data.convert import convert
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import is_fit
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


def write_folder(folder, names):
    """A folder with a table; the captions are numbers in order."""
    folder.mkdir()
    rows = [json.dumps({"image": name, "caption": str(number), "label": number}) for number, name in enumerate(names)]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(pixels(number), "PNG" if name.endswith("png") else "JPEG"))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return str(folder)


NAMES = ["a.png", "a.jpg", "sub/b.c.jpg", ".hidden.jpg", "no ending", "v1.0/d.png", "d.data", "a-2", "a_jpg"]
KEYS = ["a", "a_jpg", "sub/b_c_jpg", "_hidden_jpg", "no ending", "v1.0/d", "d_data", "a-2", "a_jpg-2"]


def test_a_folder_of_images_becomes_tars(tmp_path):
    folder = write_folder(tmp_path / "photos", NAMES)
    done = convert(folder, tmp_path / "tars")
    assert (done.num_written, done.num_errors) == (len(NAMES), 0)
    before, after = samples_of(folder), samples_of(tmp_path / "tars")
    assert [sample.key for sample in after] == KEYS
    assert [(sample.uid, sample.parts) for sample in after] == [(sample.uid, sample.parts) for sample in before]
    convert(folder, tmp_path / "a.beton")
    convert(str(tmp_path / "a.beton"), tmp_path / "back")
    assert [sample.key for sample in samples_of(tmp_path / "back")] == KEYS


@pytest.mark.parametrize("max_samples", [1, 2, 3, 100])
def test_no_sample_is_lost_where_keys_come_again(tmp_path, max_samples):
    tars = [write_tar(tmp_path / f"in/{n}.tar", members_of("000", n) + members_of("001", 10 + n)) for n in range(5)]
    folders = [write_folder(tmp_path / f"in/photos{n}", ["000.jpg", "000.png", "001.jpg"]) for n in range(2)]
    sources = [*map(str, tars), *folders]
    done = convert(sources, tmp_path / "out", max_samples=max_samples)
    source = ShardSource(shards=sources)
    assert done.num_written == len(source) == 16
    assert [sample.uid for sample in samples_of(tmp_path / "out")] == [s.uid for s in source.read(np.arange(16))]
    assert len(list((tmp_path / "out").glob("*.tar"))) == -(-16 // max_samples)


def test_a_failure_at_the_end_of_a_tar_costs_no_other_sample(tmp_path):
    """The key before it is still the last that was written."""
    folders = [write_folder(tmp_path / f"photos{number}", ["a.png"]) for number in range(2)]
    members = [*members_of("b", 1), ("b." + "x" * 300, b"too long for a name of a file")]
    middle = write_tar(tmp_path / "odd.tar", members, kind=tarfile.PAX_FORMAT)
    done = convert([folders[0], str(middle), folders[1]], tmp_path / "out", max_samples=1)
    assert (done.num_written, done.num_errors) == (2, 1)
    assert json.loads(done.errors.read_text())["reason"] == "part_not_writable"


def test_a_png_beside_the_pixels_is_not_lost(tmp_path):
    parts = [("a.png", encoded(pixels(1), "PNG")), ("a.ppm", encoded(pixels(2), "PPM")), ("a.txt", b"two")]
    write_tar(tmp_path / "a.tar", parts)
    convert(str(tmp_path / "a.tar"), tmp_path / "out")
    assert samples_of(tmp_path / "out")[0].parts == samples_of(tmp_path / "a.tar")[0].parts


names = st.text(st.sampled_from("ab./-_2 \0\n\ud800ä") | st.characters(), max_size=12) | st.sampled_from(
    ["a.png", "a.jpg", "a", "a_png", "a-2", "../a", "/a", "x" * 300, "ä" * 200 + ".png", "a/.png", ".png"]
)


@given(keys=st.lists(names, max_size=20))
def test_keys_for_a_tar_are_fit_and_distinct(keys):
    def made():
        used = {}
        return [module._tar_key(key, ("jpg", "txt", "json"), used) for key in keys]

    found = made()
    assert made() == found and len(set(found)) == len(keys)
    assert all(is_fit(key, part) for key in found for part in ("jpg", "txt", "json"))
    if len(set(keys)) == len(keys) and all(is_fit(key, "json") for key in keys):
        assert found == keys


def test_a_thousand_samples_of_one_key_take_no_thousand_tries(monkeypatch):
    tried = []
    monkeypatch.setattr(module, "is_fit", lambda key, part: tried.append(key) or is_fit(key, part))

    class Counting(dict):
        def __contains__(self, key):
            tried.append(key)
            return super().__contains__(key)

    used = Counting()
    assert len({module._tar_key("a.b", ("txt",), used) for _ in range(1000)}) == 1000
    assert len(tried) < 10_000


def test_a_target_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    folder = write_folder(tmp_path / "photos", ["a.png"])
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "out.beton", tmp_path / ("c" * 300)):
        with pytest.raises(DataError, match="cannot be written"):
            convert(folder, out)
    with pytest.raises(DataError, match="at least one sample"):
        convert(folder, tmp_path / "out", max_samples=0)
