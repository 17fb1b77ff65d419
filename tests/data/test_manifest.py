import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import encoded, members_of, pixels, write_dataset, write_tar

from vlm_train.data import decode, indexing
from vlm_train.data.decode import sample_uid
from vlm_train.data.formats.base import ENTRY, SCHEMA
from vlm_train.data.indexing import FOLDER, index_shard, open_manifest
from vlm_train.errors import DataError


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir() if path.name != ".lock"}


def test_columns_of_an_img2dataset_shard(tmp_path):
    write_dataset(tmp_path, (4, 3))
    manifest = open_manifest(str(tmp_path))
    table = manifest.table()
    assert table.schema.equals(SCHEMA) and len(table) == len(manifest) == 7
    assert table["key"].to_pylist()[:2] == ["000000", "000001"]
    assert table["label"].to_pylist() == [0, 1, 2, 0, 1, 2, 0]
    assert set(table["width"].to_pylist()) == {24} and set(table["height"].to_pylist()) == {20}
    row = table.slice(5, 1).to_pylist()[0]
    content = (tmp_path / row["shard"]).read_bytes()
    parts = {p["name"]: content[p["offset"] : p["offset"] + p["size"]] for p in row["parts"]}
    assert list(parts) == ["jpg", "txt", "json"] and parts["txt"] == b"picture 5"
    assert row["uid"] == sample_uid(parts) == manifest.uids()[5].tobytes()
    assert manifest.starts.tolist() == [0, 4, 7] and manifest.shard_of(np.array([3, 4])).tolist() == [0, 1]
    assert manifest.table(["key"]).column_names == ["key"]


def test_a_sample_costs_32_bytes_that_all_processes_share(tmp_path):
    manifest = open_manifest(str(write_dataset(tmp_path, (5, 4))))
    assert ENTRY.itemsize == 32
    assert (tmp_path / FOLDER / "index.bin").stat().st_size == 32 * len(manifest)
    assert "index.bin" in Path("/proc/self/maps").read_text()  # mapped, so ranks and workers have one copy
    held = [value for value in vars(manifest).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) <= 8 * 3 * 3  # a few words a shard, nothing a sample


def test_captions_may_come_from_json_alone(tmp_path):
    jpg, _, json_part = members_of("a", 1, metadata={"captions": ["one", "two"]})
    write_tar(tmp_path / "a.tar", [jpg, json_part])
    assert len(open_manifest(str(tmp_path))) == 1


def test_every_bad_sample_is_recorded_and_disturbs_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    bad = {
        "no_image": [("a.txt", b"x")],
        "no_caption": [("b.jpg", encoded(pixels(0)))],
        "empty_member": members_of("c", 0, image=b""),
        "image_unknown": members_of("d", 0, image=b"not an image"),
        "image_too_large": members_of("e", 0, image=encoded(pixels(0, 40, 40))),
        "caption_utf8": members_of("f", 0, caption=b"\xff\xfe"),
        "metadata_json": [*members_of("g", 0)[:2], ("g.json", b"[1]")],
        "metadata_captions": members_of("h", 0, metadata={"captions": "one"}),
        "duplicate_key": members_of("good", 9),
    }
    members = [*members_of("good", 1), *(member for group in bad.values() for member in group), *members_of("last", 2)]
    index = index_shard(str(write_tar(tmp_path / "a.tar", members)))
    table, errors = index.table(), index.errors
    assert len(table) == index.num_samples == len(index.entries())
    assert table["key"].to_pylist() == ["good", "last"]
    assert {error["reason"] for error in errors} == set(bad)
    assert {error["key"] for error in errors} == {*"abcdefgh", "good"}
    assert all(set(error) == {"shard", "key", "reason"} for error in errors)
    assert open_manifest(str(tmp_path)).errors() == errors


def test_a_shard_without_a_usable_sample_is_named(tmp_path):
    write_dataset(tmp_path, (2,))
    write_tar(tmp_path / "useless.tar", members_of("a", 0, image=b"x"))
    with pytest.raises(DataError, match=r"useless\.tar"):
        open_manifest(str(tmp_path))


def test_a_second_look_reuses_and_a_new_index_gives_the_same_bytes(tmp_path):
    write_dataset(tmp_path / "one", (4, 3))
    seen: list[tuple[int, int]] = []
    first = open_manifest(str(tmp_path / "one"), progress=lambda *done: seen.append(done))
    assert len(seen) == 2
    before = contents(tmp_path / "one")
    again = open_manifest(str(tmp_path / "one"), progress=lambda *done: seen.append(done))
    assert len(seen) == 2 and contents(tmp_path / "one") == before and again.fingerprint == first.fingerprint

    for path in (tmp_path / "one" / FOLDER).iterdir():
        path.unlink()
    assert open_manifest(str(tmp_path / "one")).fingerprint == first.fingerprint
    assert contents(tmp_path / "one") == before


def test_only_a_changed_shard_is_indexed_again(tmp_path):
    write_dataset(tmp_path, (4, 3, 2))
    first = open_manifest(str(tmp_path))
    write_tar(tmp_path / "00001.tar", members_of("new", 50))
    seen: list[tuple[int, int]] = []
    second = open_manifest(str(tmp_path), progress=lambda *done: seen.append(done))
    assert len(seen) == 1
    assert second.fingerprint != first.fingerprint and len(second) == 7
    os.utime(tmp_path / "00000.tar", ns=(0, 0))  # touched, not changed: indexed again, to the same result
    assert open_manifest(str(tmp_path)).fingerprint == second.fingerprint


def test_a_damaged_part_is_made_again(tmp_path):
    write_dataset(tmp_path, (4, 3))
    first = open_manifest(str(tmp_path))
    first.parts[0].write_bytes(first.parts[0].read_bytes()[:-1])
    assert open_manifest(str(tmp_path)).fingerprint == first.fingerprint
    for name in ("root.json", "index.bin"):
        (tmp_path / FOLDER / name).write_text("{")
        assert open_manifest(str(tmp_path)).fingerprint == first.fingerprint


def test_columns_of_other_tools_are_kept(tmp_path):
    write_dataset(tmp_path, (4,))
    manifest = open_manifest(str(tmp_path))
    table = pq.read_table(manifest.parts[0]).append_column("clip_score", pa.array([0.1, 0.2, 0.3, 0.4]))
    pq.write_table(table, manifest.parts[0])
    members = [*members_of("new", 40), *(member for i in (3, 1) for member in members_of(f"00000{i}", i))]
    write_tar(tmp_path / "00000.tar", members)
    assert open_manifest(str(tmp_path)).table()["clip_score"].to_pylist() == [None, 0.4, 0.2]


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_dataset(tmp_path / "data", (3,))
    (tmp_path / "data" / FOLDER).write_text("a file where the folder should be")
    manifest = open_manifest(str(tmp_path / "data"))
    assert manifest.parts[0].is_relative_to(tmp_path / "cache/vlm-train/manifests")
    seen: list[tuple[int, int]] = []
    assert (
        open_manifest(str(tmp_path / "data"), progress=lambda *done: seen.append(done)).fingerprint
        == manifest.fingerprint
        and not seen
    )


def test_many_processes_give_the_same_manifest(tmp_path, monkeypatch):
    alone = open_manifest(str(write_dataset(tmp_path / "alone", (4, 3, 2))))
    write_dataset(tmp_path / "together", (4, 3, 2))
    monkeypatch.setattr(indexing, "_BYTES_PER_WORKER", 1)
    assert open_manifest(str(tmp_path / "together")).fingerprint == alone.fingerprint


def _index(folder, start, queue):
    seen: list[tuple[int, int]] = []
    start.wait()
    manifest = open_manifest(folder, progress=lambda *done: seen.append(done))
    queue.put((manifest.fingerprint, len(seen)))


def test_processes_that_start_together_index_once(tmp_path):
    write_dataset(tmp_path, (6, 6, 6))
    context = multiprocessing.get_context("fork")
    start, queue = context.Event(), context.Queue()
    processes = [context.Process(target=_index, args=(str(tmp_path), start, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    found = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert sum(num for _, num in found) == 3


def test_root_json_says_what_it_must(tmp_path):
    write_dataset(tmp_path, (2,))
    manifest = open_manifest(str(tmp_path))
    root = json.loads((tmp_path / FOLDER / "root.json").read_text())
    entry, stat = root["shards"]["00000.tar"], (tmp_path / "00000.tar").stat()
    assert root["version"] == 2 and entry["part"] == manifest.parts[0].name == "00000.tar.parquet"
    assert (entry["size"], entry["version"], entry["num_samples"]) == (stat.st_size, str(stat.st_mtime_ns), 2)


def test_an_index_that_is_mostly_of_old_shards_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "_COMPACT_ABOVE", 0)
    write_dataset(tmp_path, (4, 3))
    old = open_manifest(str(tmp_path))
    for seed in range(3):
        write_tar(tmp_path / "00000.tar", [m for i in range(4) for m in members_of(f"n{i}", 10 * seed + i)])
        new = open_manifest(str(tmp_path))
    assert (tmp_path / FOLDER / "index.bin").stat().st_size <= 2 * 32 * 7
    rows = np.arange(7)
    assert new.uids(rows).tolist() == [list(uid) for uid in new.table(["uid"])["uid"].to_pylist()]
    assert old.uids(rows)[4:].tolist() == new.uids(rows)[4:].tolist()  # who had mapped the old one keeps it
    assert open_manifest(str(tmp_path)).fingerprint == new.fingerprint


def test_shards_of_several_folders_keep_the_order_given(tmp_path):
    write_dataset(tmp_path / "a", (4, 3))
    write_dataset(tmp_path / "b", (2,))
    together = open_manifest([str(tmp_path / "b"), str(tmp_path / "a")])
    rows = np.array([8, 0, 5, 1, 2])
    uids = [uid for folder in ("b", "a") for uid in open_manifest(str(tmp_path / folder)).uids().tolist()]
    assert together.uids(rows).tolist() == [uids[row] for row in rows]
    assert together.starts.tolist() == [0, 2, 6, 9]
    turned = open_manifest([str(tmp_path / "a"), str(tmp_path / "b")])
    assert turned.fingerprint != together.fingerprint


def _index_slowly(folder):
    indexing._ROOT_EVERY = 0.0
    open_manifest(
        folder, progress=lambda *done: os.kill(os.getpid(), signal.SIGKILL) if len(os.listdir(folder)) else None
    )


def test_indexing_that_was_killed_goes_on_where_it_was(tmp_path):
    write_dataset(tmp_path, (4, 3, 5))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_index_slowly, args=(str(tmp_path),))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    with open(tmp_path / FOLDER / "index.bin", "ab") as index:
        index.write(b"half a record")
    manifest = open_manifest(str(tmp_path))
    assert manifest.uids().tolist() == [list(uid) for uid in manifest.table(["uid"])["uid"].to_pylist()]
