import errno
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from data_fixtures import members_of, write_dataset, write_tar

from vlm_train.data import local
from vlm_train.data.decode import SampleError
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
