"""Whatever befalls the files of a manifest: they are made again, or an error names the file and what to do."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import members_of, write_dataset, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_train.data import home, indexing
from vlm_train.data.decode import SampleError
from vlm_train.data.indexing import FOLDER, open_manifest
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.stats import statistics
from vlm_train.data.verify import verify
from vlm_train.errors import DataError

MANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@pytest.fixture
def said(monkeypatch):
    found = []
    monkeypatch.setattr(indexing.log, "warning", lambda text, *values: found.append(text % values))
    return found


@pytest.fixture
def whole(tmp_path):
    """A folder of three shards, one with something left out, and its manifest as it should be."""
    write_dataset(tmp_path / "data", (4, 3))
    bad = members_of("bad", 8, caption=b"\xff")
    write_tar(tmp_path / "data" / "a.tar", [*members_of("good", 7), *bad])
    manifest = open_manifest(str(tmp_path / "data"))
    shutil.copytree(tmp_path / "data" / FOLDER, tmp_path / "copy")
    return tmp_path / "data", manifest


def restored(folder):
    shutil.rmtree(folder / FOLDER)
    shutil.copytree(folder.parent / "copy", folder / FOLDER)
    return folder / FOLDER


def everything(folder):
    """Whatever reads a manifest, but for training; returns what is wrong with each sample."""
    source = ShardSource(shards=str(folder))
    source.manifest.errors()
    source.manifest.table()
    found = source.read(np.arange(len(source)))
    places = [source.locate(row) for row in range(len(source))]
    statistics(str(folder), num_examples=3)
    verify(str(folder), mode="full", num_workers=1)
    return source.fingerprint, found, places


def edit_root(folder, change):
    path = folder / FOLDER / "root.json"
    root = json.loads(path.read_text())
    change(root)
    path.write_text(json.dumps(root))


NOTHING = [None, {}, [], -1, True, 1.5, 10**30, 1 << 62, "x", "", [1], {"a": 1}]


FACTS = ("size", "version", "start", "num_samples", "content", "index_sha256", "num_errors", "ignored", "files")
CAN_BE_MEANT = (("ignored", {}), ("ignored", {"a": 1}), ("version", "x"), ("version", ""))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in FACTS for value in NOTHING if (name, value) not in CAN_BE_MEANT],
    ids=str,
)
def test_an_entry_that_cannot_be_meant_is_made_again(whole, said, name, value):
    folder, manifest = whole
    edit_root(folder, lambda root: root["shards"]["a.tar"].update({name: value}))
    assert open_manifest(str(folder)).fingerprint == manifest.fingerprint
    assert any("root.json" in line and "a.tar" in line for line in said)
    assert everything(folder)[0] == manifest.fingerprint


@pytest.mark.parametrize("name", FACTS)
def test_nor_can_one_that_says_less(whole, said, name):
    folder, manifest = whole
    edit_root(folder, lambda root: root["shards"]["a.tar"].pop(name))
    assert open_manifest(str(folder)).fingerprint == manifest.fingerprint
    assert any("root.json" in line and "a.tar" in line for line in said)


@pytest.mark.parametrize("value", NOTHING, ids=str)
@pytest.mark.parametrize("fact", ["size", "sha256", None])
def test_nor_is_what_it_says_of_files_believed(whole, fact, value):
    folder, manifest = whole

    def change(root):
        files = root["shards"]["a.tar"]["files"]
        files["errors"] = {**files["errors"], fact: value} if fact else value

    edit_root(folder, change)
    assert everything(folder)[0] == manifest.fingerprint


ROOTS = [b"", b"{", b"[" * 100_000, b"{}", b"null", b"[]", b'{"version": 5}', b'{"version": 5, "shards": []}', b"\xff"]


@pytest.mark.parametrize("content", [*ROOTS, b'{"version": 5, "shards": {"a.tar": {}, "b": 1}}'], ids=range(10))
def test_a_root_that_cannot_be_read_is_made_again(whole, said, content):
    folder, manifest = whole
    (folder / FOLDER / "root.json").write_bytes(content)
    assert open_manifest(str(folder)).fingerprint == manifest.fingerprint
    assert sum("is damaged" in line and "root.json" in line for line in said) == 1
    said.clear()
    assert everything(folder)[0] == manifest.fingerprint
    assert not said  # once is enough


@pytest.mark.parametrize("size", [0, 1, None])
@pytest.mark.parametrize("name", ["a.tar.errors", "00000.tar.parquet", "index.bin", "root.json"])
def test_a_file_that_is_cut_off_or_gone_is_made_again(whole, said, name, size):
    folder, manifest = whole
    file = folder / FOLDER / name
    file.unlink() if size is None else file.write_bytes(file.read_bytes()[:size])
    assert open_manifest(str(folder)).errors() == manifest.errors()
    assert everything(folder)[0] == manifest.fingerprint
    for path in (folder.parent / "copy").glob("*.tar.*"):
        assert (folder / FOLDER / path.name).read_bytes() == path.read_bytes()
    new = name == "root.json" and size is None  # nothing tells that there was one
    assert any("is damaged" in line and name in line for line in said) != new


def test_what_a_folders_table_said_is_made_again(tmp_path, said):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        (photos / f"{seed}.jpg").write_bytes(members_of("k", seed)[0][1])
        (photos / f"{seed}.txt").write_text(f"picture {seed}")
    source = ShardSource(shards=str(photos))
    records = Path(source.manifest.file_of(0))
    content = records.read_bytes()
    for damage in (content[:-5], None):
        records.write_bytes(damage) if damage else records.unlink()
        found = ShardSource(shards=str(photos)).read(np.arange(3))
        assert [sample.key for sample in found] == ["0.jpg", "1.jpg", "2.jpg"]
        assert records.read_bytes() == content
    assert sum("photos.records" in line for line in said) == 2
    records.write_bytes(content.replace(b"picture 1", b"picture 9"))
    found = [(problem.key, problem.reason) for problem in verify(str(photos)).problems]
    assert found == [("", "index_changed")]
    full = verify(str(photos), mode="full", num_workers=1).problems
    assert [(problem.key, problem.reason) for problem in full] == [("", "index_changed"), ("1.jpg", "shard_changed")]


def test_a_list_of_what_was_left_out_that_lies_is_refused(whole):
    folder, manifest = whole
    path = folder / FOLDER / "a.tar.errors"
    content = path.read_bytes()
    number = json.dumps({**manifest.errors()[0], "key": 1}).encode()
    for lie in (b"x", b"[" * 100_000, b"{}", b"[]", b"null", number, b"\xff", b'{"shard": 1}'):
        path.write_bytes(lie)
        opened = home.Home.load(folder / FOLDER)
        opened.entries["a.tar"]["files"]["errors"]["size"] = len(lie)
        (folder / FOLDER / "root.json").write_text(json.dumps({"version": home.VERSION, "shards": opened.entries}))
        with pytest.raises(DataError, match=r"a\.tar\.errors(.|\n)*remove it"):
            open_manifest(str(folder)).errors()
    path.unlink()  # what it says to do
    assert open_manifest(str(folder)).errors() == manifest.errors() and path.read_bytes() == content


@MANY
@given(data=st.data())
def test_no_damage_to_a_part_gives_other_columns(whole, data):
    """Or anything but an error of ours that names it."""
    folder, manifest = whole
    part = restored(folder) / "00000.tar.parquet"
    damaged = bytearray(part.read_bytes())
    truth, distributions = manifest.table(), statistics(str(folder), num_examples=1).distributions
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 5))] = data.draw(st.integers(0, 255))
    part.write_bytes(damaged)
    for look, expected in (
        (lambda: manifest.table().select(truth.column_names), truth),
        (lambda: statistics(str(folder), num_examples=1).distributions, distributions),
    ):
        try:
            assert look() == expected
        except DataError as error:
            assert part.name in str(error) and "remove it" in str(error)
    assert ShardSource(shards=str(folder)).locate(2) in (("00000.tar", "000002"), ("00000.tar", ""))
    wanted = [] if part.read_bytes() == (folder.parent / "copy" / part.name).read_bytes() else ["part_changed"]
    assert [problem.reason for problem in verify(str(folder)).problems if problem.key != "bad"] == wanted


@MANY
@given(data=st.data())
def test_no_damage_to_the_index_gives_a_sample_under_another_ones_name(whole, data):
    folder, _ = whole
    index = restored(folder) / "index.bin"
    truth = ShardSource(shards=str(folder)).read(np.arange(8))
    damaged = bytearray(index.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    if damaged == index.read_bytes():
        return
    index.write_bytes(damaged)
    _, found, _ = everything(folder)
    for old, new in zip(truth, found, strict=True):
        assert new.reason == "shard_changed" if isinstance(new, SampleError) else new == old
    assert "index_changed" in {problem.reason for problem in verify(str(folder)).problems}


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, 1 << 62, 1 << 40])
def test_an_offset_beyond_the_shard_costs_its_sample_alone(whole, offset):
    folder, _ = whole
    index = np.memmap(folder / FOLDER / "index.bin", home.ENTRY, mode="r+")
    index["offset"][1] = offset
    index.flush()
    _, found, _ = everything(folder)
    bad = [row for row, sample in enumerate(found) if isinstance(sample, SampleError)]
    assert len(bad) == 1 and "index.bin" in found[bad[0]].detail
    assert [(p.reason, p.key) for p in verify(str(folder)).problems if p.key != "bad"] == [("index_changed", "")]


def test_columns_of_other_tools_are_lost_with_a_damaged_part_but_not_in_silence(whole, said):
    folder, manifest = whole
    part = manifest.parts[0]
    pq.write_table(pq.read_table(part).append_column("score", pa.array(range(4))), part)
    part.write_bytes(part.read_bytes()[:-3])
    assert "score" not in open_manifest(str(folder)).part(0).column_names
    assert any("columns that other tools added to it are lost" in line and part.name in line for line in said)


def test_columns_of_several_types_are_an_error(whole):
    folder, manifest = whole
    for number, values in enumerate((pa.array(range(4)), pa.array(["x"] * 3))):
        part = manifest.parts[number]
        pq.write_table(pq.read_table(part).append_column("score", values), part)
    with pytest.raises(DataError, match="differ in type"):
        open_manifest(str(folder)).table()
    assert len(open_manifest(str(folder)).table(["key"])) == 8


def test_a_disk_that_is_full_is_named_and_nothing_half_done_is_left(whole, monkeypatch):
    folder, manifest = whole
    write_tar(folder / "00001.tar", members_of("new", 50))
    real = home.os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(home.os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written(.|\n)*No space left(.|\n)*make room"):
        open_manifest(str(folder))
    monkeypatch.setattr(home.os, "fsync", real)
    assert not list((folder / FOLDER).glob("*.tmp"))
    assert len(open_manifest(str(folder))) == len(manifest) - 2


def test_what_a_killed_process_left_goes(whole):
    folder, manifest = whole
    (folder / FOLDER / ".x.parquet.1.tmp").write_bytes(b"half")
    with open(folder / FOLDER / "index.bin", "ab") as index:
        index.write(b"half a record")
    assert open_manifest(str(folder)).uids().tolist() == manifest.uids().tolist()  # nothing had to be indexed
    write_tar(folder / "new.tar", members_of("new", 50))
    assert open_manifest(str(folder)).table(["key"])["key"].to_pylist()[-1] == "new"
    assert not list((folder / FOLDER).glob("*.tmp"))


def test_an_index_that_is_made_anew_meanwhile_is_not_read_by_the_old_root(whole, monkeypatch):
    """Compaction between the two readings: the records would be those of other samples."""
    folder, _ = whole
    real, seen = home._map, []

    def mapped(path):
        if not seen:
            seen.append(path)
            monkeypatch.setattr(home, "_COMPACT_ABOVE", 0)
            monkeypatch.setattr(home, "_map", real)
            for seed in range(4):
                write_tar(folder / "00000.tar", [m for i in range(4) for m in members_of(f"n{i}", 10 * seed + i)])
                open_manifest(str(folder))
        return real(path)

    monkeypatch.setattr(home, "_map", mapped)
    loaded = home.Home.load(folder / FOLDER)
    assert seen and len(loaded.index) < 4 * 5
    for name, entry in loaded.entries.items():
        uids = loaded.index["uid"][entry["start"] : entry["start"] + entry["num_samples"]]
        assert home.hashlib.sha256(uids.tobytes()).hexdigest() == entry["content"], name
