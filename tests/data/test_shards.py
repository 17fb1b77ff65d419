import multiprocessing
import os
import pickle

import pytest
from data_fixtures import members_of, write_dataset, write_tar

from vlm_train.data import tar
from vlm_train.data.decode import SampleError
from vlm_train.data.sources import shards as module
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError


def test_reads_every_row_as_it_lies_in_the_tar(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (4, 3))))
    assert len(source) == 7 and source.shard_starts.tolist() == [0, 4, 7]
    for row in (6, 0, 3, 4):
        raw = source.read(row)
        name, key = source.locate(row)
        content = (tmp_path / name).read_bytes()
        sample = next(s for s in tar.index_tar(tmp_path / name).samples if s.key == key)
        assert raw.parts == {p.name: content[p.offset : p.offset + p.size] for p in sample.parts}
        assert (raw.shard, raw.key, raw.uid) == (name, key, source.manifest.uids[row].tobytes())


def test_a_shard_that_changed_after_indexing_is_convicted(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (3,))))
    path = tmp_path / "00000.tar"
    content = bytearray(path.read_bytes())
    content[int(source.manifest.offsets[1]) + 700] ^= 1  # one bit of the image of row 1, in place
    path.write_bytes(content)
    assert source.read(0).key == "000000"
    with pytest.raises(SampleError, match="vlm-train data index") as caught:
        source.read(1)
    assert caught.value.reason == "shard_changed"
    write_tar(path, members_of("other", 9))
    with pytest.raises(SampleError):
        ShardSource.read(source, 2)


def test_a_shard_that_vanished_is_an_os_error_with_a_name(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (3,))))
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="00000"):
        source.read(0)
    assert source.locate(0) == ("00000.tar", "")


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_OPEN_FILES", 3)
    source = ShardSource(shards=str(write_dataset(tmp_path, (2,) * 8)))
    before = len(os.listdir("/proc/self/fd"))
    keys = [source.read(row).key for _ in range(2) for row in range(16)]
    assert keys[:16] == keys[16:] and len(set(keys)) == 16
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_pickled_source_is_small_and_opens_the_manifest_itself(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (40, 40))))
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert pickle.loads(sent).read(41).parts == source.read(41).parts
    write_tar(tmp_path / "00000.tar", members_of("new", 5))
    with pytest.raises(DataError, match="changed while"):
        pickle.loads(sent)


def _read_all(source, queue):
    queue.put([source.read(row).key for row in range(len(source))])


def test_open_files_survive_a_fork(tmp_path):
    source = ShardSource(shards=str(write_dataset(tmp_path, (5, 5))))
    keys = [source.read(row).key for row in range(10)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read_all, args=(source, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [source.read(row).key for row in range(10)] == keys
    assert [queue.get(timeout=30) for _ in processes] == [keys, keys]
    for process in processes:
        process.join(timeout=30)
