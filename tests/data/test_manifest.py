import hashlib
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

from vlm_train.data import decode, home, indexing
from vlm_train.data.decode import sample_uid
from vlm_train.data.formats.base import ENTRY, SCHEMA
from vlm_train.data.indexing import FOLDER, index_shard, open_manifest
from vlm_train.data.sources.shards import ShardSource
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


def test_a_change_of_any_part_that_is_read_is_a_change_of_the_manifest(tmp_path):
    """Also of KEY.json where there is a KEY.txt, too."""
    members = [member for seed in range(2) for member in members_of(f"k{seed}", seed)]
    versions = [members]
    for number, (name, content) in enumerate(members):
        other = content.replace(b'"label": ', b'"label": 1') if name.endswith("json") else content + b"!"
        versions.append([*members[:number], (name, other), *members[number + 1 :]])
    versions.append([*members[:2], ("k0.json", members[5][1]), *members[3:5], ("k1.json", members[2][1])])
    fingerprints = []
    for number, version in enumerate(versions):
        write_tar(tmp_path / f"{number}" / "a.tar", version)
        fingerprints.append(open_manifest(str(tmp_path / f"{number}")).fingerprint)
    assert len(set(fingerprints)) == len(versions) == 8


def as_of_version_2(folder):
    """What the manifest of a folder was before uids covered KEY.json: entries of other keys, and other uids."""
    part = open_manifest(str(folder)).parts[0]
    root = json.loads((folder / FOLDER / "root.json").read_text())
    kept = ("size", "version", "start", "num_samples", "content", "num_errors", "ignored")
    for entry in root["shards"].values():
        old = {name: entry[name] for name in kept}
        entry.clear()
        entry.update(old, part=part.name, part_sha256="0" * 64, records=None)
    (folder / FOLDER / "root.json").write_text(json.dumps({**root, "version": 2}))
    table = pq.read_table(part).drop_columns("image_hash")
    uids = pa.array([hashlib.sha256(uid).digest()[:16] for uid in table["uid"].to_pylist()], pa.binary(16))
    table = table.set_column(0, "uid", uids).append_column("clip_score", pa.array([0.1, 0.2, 0.3, 0.4]))
    pq.write_table(table, part)


def test_a_manifest_of_another_version_is_made_anew_and_columns_of_other_tools_stay(tmp_path):
    write_dataset(tmp_path, (4,))
    fingerprint = open_manifest(str(tmp_path)).fingerprint
    as_of_version_2(tmp_path)
    manifest = open_manifest(str(tmp_path))
    assert manifest.fingerprint == fingerprint
    assert manifest.table().column_names == [*SCHEMA.names, "clip_score"]
    assert manifest.table()["clip_score"].to_pylist() == [0.1, 0.2, 0.3, 0.4]


def test_nothing_is_carried_from_another_version_to_a_shard_that_changed(tmp_path):
    write_dataset(tmp_path, (4,))
    as_of_version_2(tmp_path)
    write_tar(tmp_path / "00000.tar", [member for i in range(4) for member in members_of(f"00000{i}", i + 10)])
    assert open_manifest(str(tmp_path)).table()["clip_score"].to_pylist() == [None] * 4


def names(shard):
    return [path.name for path in (shard.parent / FOLDER).iterdir()]


@pytest.mark.parametrize("name", ["x" * 238, "x" * 251, "é" * 125, "\U0001f600" * 62, "a" + "é" * 120])
def test_a_long_name_of_a_shard_fits_and_stays_readable(tmp_path, name):
    shard = tmp_path / f"{name}.tar"
    write_tar(tmp_path / "short.tar", [*members_of("a", 1), *members_of("bad", 2, caption=b"\xff")]).rename(shard)
    first = open_manifest(str(shard))
    assert first.errors() == [{"shard": shard.name, "key": "bad", "reason": "caption_utf8"}]
    assert all(len(name.encode()) < 220 for name in names(shard))
    assert first.parts[0].name.startswith(shard.name[:40]) and first.parts[0].name.encode().decode("utf-8")
    before = contents(tmp_path)
    assert open_manifest(str(shard)).fingerprint == first.fingerprint and contents(tmp_path) == before


def test_names_that_begin_alike_are_kept_apart(tmp_path):
    long = ["x" * 230 + end for end in ("a.tar", "b.tar")]
    for seed, name in enumerate(long):
        write_tar(tmp_path / name, members_of(f"k{seed}", seed))
    assert open_manifest(str(tmp_path)).table(["key"])["key"].to_pylist() == ["k0", "k1"]
    urls = [f"https://host/{name}" for name in ("a_b.tar", "a%2Fb.tar", "a_b.tar?x=1", "a_b.tar?x=2", "a%00b.tar")]
    assert len({home.name_in(url) for url in [*urls, *(f"/d/{name}" for name in long)]}) == 7
    assert home.name_in(urls[0]) == "a_b.tar"


def test_a_name_that_is_no_text_is_no_reason_to_fail(tmp_path):
    shard = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.tar")
    os.rename(write_tar(tmp_path / "a.tar", [*members_of("a", 1), *members_of("bad", 2, caption=b"\xff")]), shard)
    manifest = open_manifest(shard)
    assert manifest.table()["shard"].to_pylist() == ["caf\\udce9.tar"] == [manifest.errors()[0]["shard"]]
    assert ShardSource(shards=shard).locate(0) == ("caf\\udce9.tar", "a")


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
    assert root["version"] == 5 and manifest.parts[0].name == "00000.tar.parquet"
    assert (entry["size"], entry["version"], entry["num_samples"]) == (stat.st_size, str(stat.st_mtime_ns), 2)
    part = manifest.parts[0].read_bytes()
    assert entry["files"] == {"parquet": {"size": len(part), "sha256": hashlib.sha256(part).hexdigest()}}
    index = (tmp_path / FOLDER / "index.bin").read_bytes()
    assert entry["index_sha256"] == hashlib.sha256(index).hexdigest()
    assert entry["content"] == hashlib.sha256(manifest.uids().tobytes()).hexdigest()


def test_an_index_that_is_mostly_of_old_shards_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(home, "_COMPACT_ABOVE", 0)
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
