import errno
import multiprocessing
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import loader_of, members_of, write_dataset, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_train.data import local
from vlm_train.data.decode import SampleError
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError


def test_reads_any_rows_as_they_lie_in_the_tar(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (4, 3))))
    assert len(source) == 7 and source.shard_starts.tolist() == [0, 4, 7]
    rows = np.array([6, 0, 3, 4, 0])
    table = source.manifest.table().to_pylist()
    for row, raw in zip(rows, source.read(rows), strict=True):
        name, key = source.locate(row)
        content = (tmp_path / name).read_bytes()
        facts = table[row]
        assert raw.parts == {p["name"]: content[p["offset"] : p["offset"] + p["size"]] for p in facts["parts"]}
        assert (
            (raw.shard, raw.key, raw.uid) == (name, key, facts["uid"]) == (facts["shard"], facts["key"], facts["uid"])
        )
    assert source.read(np.array([], np.int64)) == []


def test_a_shard_that_changed_after_indexing_is_convicted(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (3,))))
    path = tmp_path / "00000.tar"
    content = bytearray(path.read_bytes())
    content[int(source.manifest.entries(np.array([1]))["offset"][0]) + 700] ^= 1  # one bit of an image, in place
    path.write_bytes(content)
    good, bad = source.read(np.arange(2))
    assert good.key == "000000"
    assert isinstance(bad, SampleError) and bad.reason == "shard_changed" and "vlm-train data index" in bad.remedy
    write_tar(path, members_of("other", 9))
    assert [error.reason for error in source.read(np.arange(3))] == ["shard_changed"] * 3


def test_a_shard_that_vanished_costs_its_samples_alone_and_they_are_named(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (3, 2))))
    (tmp_path / "00000.tar").unlink()
    *lost, whole = source.read(np.array([0, 1, 4]))
    assert [error.reason for error in lost] == ["shard_unreadable"] * 2 and "00000.tar" in lost[0].detail
    assert whole.key == "010004"
    assert source.locate(1) == ("00000.tar", "000001")


def put_in_its_place(path, members):
    """Another shard under the same name, as a download that is repeated puts it there."""
    os.replace(write_tar(path.with_suffix(".new"), members), path)


@pytest.mark.parametrize("num_samples", [1, 5], ids=["shorter", "longer"])
def test_a_shard_that_is_replaced_and_indexed_anew_meanwhile_is_convicted_and_not_named_by_other_keys(
    tmp_path, num_samples
):
    source = ShardSource(shards=str(write_dataset(tmp_path, (3, 2))))
    put_in_its_place(
        tmp_path / "00000.tar", [member for i in range(num_samples) for member in members_of(f"new{i}", 40 + i)]
    )
    assert len(open_manifest(str(tmp_path))) == num_samples + 2  # `vlm-train data index` by somebody else
    *lost, whole = source.read(np.array([0, 2, 3]))
    assert [error.reason for error in lost] == ["shard_changed"] * 2 and whole.key == "010003"
    assert [source.locate(row) for row in range(5)] == [("00000.tar", "")] * 3 + [
        ("00001.tar", "010003"),
        ("00001.tar", "010004"),
    ]


def test_a_run_goes_on_when_a_shard_is_replaced_and_indexed_anew(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (8, 20))))
    loader = loader_of(source, Selection.all(28), num_steps=3)
    batches = iter(loader)
    before = next(batches)["errors"]
    put_in_its_place(tmp_path / "00000.tar", members_of("new", 40))
    open_manifest(str(tmp_path))
    later = [error for batch in batches for error in batch["errors"]]
    assert not before and {(error["shard"], error["key"], error["reason"]) for error in later} == {
        ("00000.tar", "", "shard_changed")
    }
    assert all(error["replaced_by"] >= 8 for error in later)


def test_a_shard_that_was_only_touched_and_indexed_anew_is_named_on(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (3,))))
    os.utime(tmp_path / "00000.tar", ns=(0, 0))
    open_manifest(str(tmp_path))
    part = source.manifest.parts[0]
    pq.write_table(pq.read_table(part).append_column("score", pa.array([1, 2, 3])), part)  # nor does curation matter
    assert source.locate(1) == ("00000.tar", "000001")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_no_byte_of_a_part_changes_unnoticed(tmp_path, data):
    path = tmp_path / "a.tar"
    members = [member for seed in range(2) for member in members_of(f"k{seed}", seed)]
    write_tar(path, members)
    source = ShardSource(shards=str(path))
    content = bytearray(path.read_bytes())
    part = data.draw(st.sampled_from(source.manifest.table().to_pylist()[1]["parts"]))
    content[part["offset"] + data.draw(st.integers(0, part["size"] - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    good, bad = source.read(np.arange(2))
    assert good.key == "k0" and isinstance(bad, SampleError) and bad.reason == "shard_changed"


def test_captions_of_the_metadata_that_change_places_are_noticed(tmp_path):
    """Where there is a KEY.txt, too; headers and lengths stay what they were."""
    members = [m for seed in range(2) for m in members_of("ab"[seed], seed, metadata={"captions": [f"caption {seed}"]})]
    path = write_tar(tmp_path / "a.tar", members)
    source = ShardSource(shards=str(path))
    content = path.read_bytes()
    one, two = members[2][1], members[5][1]
    path.write_bytes(content.replace(one, b"?" * len(one)).replace(two, one).replace(b"?" * len(one), two))
    assert [sample.reason for sample in source.read(np.arange(2))] == ["shard_changed"] * 2
    assert ShardSource(shards=str(path)).fingerprint != source.fingerprint


def test_one_bad_place_of_a_disk_costs_one_sample(tmp_path, monkeypatch):
    """Which samples a rank asks for together must not decide which of them are lost."""
    source = ShardSource(shards=str(write_dataset(tmp_path, (5,))))
    bad = int(source.manifest.entries(np.array([2]))["offset"][0])
    whole = os.pread

    def pread(descriptor, length, offset):
        if offset <= bad < offset + length:
            raise OSError(errno.EIO, "Input/output error")
        return whole(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    found = source.read(np.arange(5))
    assert [isinstance(sample, SampleError) for sample in found] == [False, False, True, False, False]


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_MAX_OPEN_FILES", 3)
    source = ShardSource(shards=str(write_dataset(tmp_path, (2,) * 8)))
    before = len(os.listdir("/proc/self/fd"))
    keys = [sample.key for _ in range(2) for sample in source.read(np.arange(16))]
    assert keys[:16] == keys[16:] and len(set(keys)) == 16
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_pickled_source_is_small_and_opens_the_manifest_itself(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (40, 40))))
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    (mine,), (theirs,) = source.read(np.array([41])), pickle.loads(sent).read(np.array([41]))
    assert mine.parts == theirs.parts
    write_tar(tmp_path / "00000.tar", members_of("new", 5))
    with pytest.raises(DataError, match="changed while"):
        pickle.loads(sent)


def _read_all(source, queue):
    queue.put([sample.key for sample in source.read(np.arange(len(source)))])


def test_open_files_survive_a_fork(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (5, 5))))
    keys = [sample.key for sample in source.read(np.arange(10))]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read_all, args=(source, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [sample.key for sample in source.read(np.arange(10))] == keys
    assert [queue.get(timeout=30) for _ in processes] == [keys, keys]
    for process in processes:
        process.join(timeout=30)
