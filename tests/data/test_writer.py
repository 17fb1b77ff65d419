"""Shards are byte-identical, plain and never overwritten; a dataset is finished or it is not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from promptly import promptly

import vlm_train
from vlm_train.data.parallel import map_in_processes
from vlm_train.data.writer import DatasetWriter, ShardWriter, hash_fraction, to_json
from vlm_train.errors import DataError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(vlm_train.__file__).parents[1])}
PARTS = {"png": b"\x89PNG pretend", "txt": b"a caption", "json": b"{}"}


def build(directory: Path, num: int = 5, **parameters: object):
    with DatasetWriter(directory, parameters={"dataset": "test", **parameters}, max_samples=2) as writer:
        if writer.finished is not None:
            return writer.finished
        for index in range(num):
            writer.add("train" if index else "val", f"{index:05d}", PARTS)
        return writer.finish()


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_shards_are_plain_ustar_without_time_or_owner(tmp_path):
    writer = ShardWriter(tmp_path / "train", max_samples=3)
    for index in range(7):
        writer.write(f"{index:05d}", PARTS)
    rows = writer.close()
    assert [row["num_samples"] for row in rows] == [3, 3, 1]
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    for row in rows:
        content = (tmp_path / "train" / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert len(content) == row["num_bytes"]
    with tarfile.open(tmp_path / "train/00000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:4]] == ["00000.png", "00000.txt", "00000.json", "00001.png"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        assert tar.extractfile("00002.txt").read() == b"a caption"


@settings(max_examples=20, deadline=None)
@given(
    contents=st.lists(st.tuples(st.binary(min_size=1, max_size=2000), st.binary(min_size=1)), min_size=1, max_size=6),
    size=st.integers(1, 4),
)
def test_whatever_is_written_is_read_back_in_order(tmp_path_factory, contents, size):
    directory = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(directory, max_samples=size)
    for index, (image, text) in enumerate(contents):
        writer.write(f"k{index}", {"0.jpg": image, "txt": text})
    found = []
    for row in writer.close():
        with tarfile.open(directory / row["file"]) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    expected = [pair for i, (a, b) in enumerate(contents) for pair in ((f"k{i}.0.jpg", a), (f"k{i}.txt", b))]
    assert found == expected


@pytest.mark.parametrize("key", ["", "a.b", "/a", "../a", "a/../b", "a\0b", "x" * 241, "\ud800"])
def test_unfit_keys_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="unfit sample key"):
        ShardWriter(tmp_path).write(key, PARTS)


@pytest.mark.parametrize("parts", [{}, {"jpg": b""}, {"JPG": b"x"}, {"a/b": b"x"}, {"pickle": b"x"}])
def test_unfit_parts_are_refused(tmp_path, parts):
    with pytest.raises(DataError, match="empty or unfit part"):
        ShardWriter(tmp_path).write("a", parts)


def test_a_key_twice_in_a_row_is_refused(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.write("a", PARTS)
    with pytest.raises(DataError, match="distinct keys"):
        writer.write("a", PARTS)


@pytest.mark.parametrize("max_samples", [0, -1])
def test_a_shard_without_a_sample_is_refused(tmp_path, max_samples):
    with pytest.raises(DataError, match="at least one sample"):
        ShardWriter(tmp_path, max_samples=max_samples)


def test_shards_are_never_overwritten(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.write("a", PARTS)
    writer.close()
    with pytest.raises(DataError, match="never overwritten"):
        ShardWriter(tmp_path)


def test_same_input_same_bytes_other_input_other_bytes(tmp_path):
    for name, num in (("one", 5), ("two", 5), ("other", 6)):
        build(tmp_path / name, num)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert tree(tmp_path / "one") != tree(tmp_path / "other")  # the twin: the comparison can fail


def test_the_same_command_again_does_nothing(tmp_path):
    first = build(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    again = build(tmp_path / "set")
    assert not first.already_there
    assert again.already_there
    assert again.num_samples == first.num_samples == {"train": 4, "val": 1}
    assert again.num_bytes == first.num_bytes
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before


def test_other_parameters_are_refused_with_the_difference(tmp_path):
    build(tmp_path / "set", seed=1)
    with pytest.raises(DataError) as caught:
        build(tmp_path / "set", seed=2)
    assert caught.value.got == {"seed": 2}
    assert caught.value.allowed == {"seed": 1}
    assert caught.value.remedy


def test_a_cut_shard_of_a_finished_dataset_is_noticed(tmp_path):
    build(tmp_path / "set")
    shard = tmp_path / "set/train/00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match="missing or cut"):
        build(tmp_path / "set")


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="holds no dataset of ours"):
        build(tmp_path)
    (tmp_path / "thesis.tex").rename(tmp_path / "dataset.json")
    with pytest.raises(DataError, match="not ours or is damaged"):
        build(tmp_path)
    assert (tmp_path / "dataset.json").read_text() == "precious"


DAMAGED = ["[" * 100_000, "5", "[]", '{"parameters": 5}', '{"parameters": {"a": 1}, "splits": []}']
DAMAGED += ['{"parameters": {}, "splits": {"train": [{"file": 5}]}}', '{"parameters": [[1, 2]], "splits": {}}']
DAMAGED += ['{"parameters": {}, "splits": {}, "num_samples": 5, "num_errors": 0, "facts": {}}']


@pytest.mark.parametrize("document", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_dataset_json_is_an_error(tmp_path, document):
    (tmp_path / "dataset.json").write_text(document)
    with pytest.raises(DataError, match="not ours or is damaged"):
        build(tmp_path)


def test_a_dataset_json_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")
    with promptly(), pytest.raises(DataError, match="not ours or is damaged"):
        build(tmp_path)


def test_what_cannot_be_a_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("precious")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="cannot be written"):
            build(directory)
        with pytest.raises(DataError, match="cannot be written"):
            ShardWriter(directory)
    assert (tmp_path / "file").read_text() == "precious"


def test_two_builders_of_one_directory(tmp_path):
    with (
        DatasetWriter(tmp_path / "set", parameters={}) as _,
        pytest.raises(DataError, match="another process"),
        DatasetWriter(tmp_path / "set", parameters={}),
    ):
        pass
    with DatasetWriter(tmp_path / "set", parameters={}) as writer:
        assert writer.finished is None


KILLED = """
import sys, time
from pathlib import Path
from vlm_train.data.writer import DatasetWriter
writer = DatasetWriter(Path(sys.argv[1]), parameters={"dataset": "test"}, max_samples=2)
for index in range(9):
    writer.add("other", f"{index:05d}", {"txt": b"left over"})
print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_build_is_built_anew_by_the_same_command(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "set")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "set/other/00003.tar").exists()
    assert not (tmp_path / "set/dataset.json").exists()
    build(tmp_path / "set")
    build(tmp_path / "clean")
    assert tree(tmp_path / "set") == tree(tmp_path / "clean")


def square(number: int) -> int:
    if number == 1313:
        raise DataError("thirteen", got=number)
    return number * number


def test_map_in_processes_keeps_order_and_passes_errors_on():
    assert list(map_in_processes(square, range(1000), num_workers=2)) == [number * number for number in range(1000)]
    with pytest.raises(DataError, match="thirteen"):
        list(map_in_processes(square, range(2000), num_workers=2))


ORPHANS = """
from vlm_train.data.parallel import map_in_processes
if __name__ == "__main__":
    import sys
    sys.path.insert(0, sys.argv[1])
    from orphan_job import report
    list(map_in_processes(report, [0, 1, 2, 3], num_workers=2, chunk_size=1))
"""
JOB = """
import os, time
def report(number):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_workers_die_with_a_killed_parent(tmp_path):
    (tmp_path / "job.py").write_text(ORPHANS)
    (tmp_path / "orphan_job.py").write_text(JOB)
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert all(alive(pid) for pid in pids)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


json_text = st.text(st.characters() | st.sampled_from("\ud800\udbff\udc00\udfff\\"))


@given(metadata=st.dictionaries(json_text, json_text | st.integers(), max_size=4))
def test_whatever_json_can_spell_is_kept(metadata):
    text = to_json(metadata).decode("utf-8")
    assert json.loads(text) == json.loads(json.dumps(metadata))
    assert "\n" not in text


@given(text=st.text())
def test_hash_fraction_is_a_fixed_number_in_range(text):
    assert 0 <= hash_fraction(text) < 1
    assert hash_fraction("waving hand") == int(hashlib.sha256(b"waving hand").hexdigest()[:16], 16) / 2**64


def test_dataset_json_names_every_shard(tmp_path):
    build(tmp_path / "set")
    document = json.loads((tmp_path / "set/dataset.json").read_text())
    listed = {f"{split}/{row['file']}" for split, rows in document["splits"].items() for row in rows}
    assert listed == {str(path.relative_to(tmp_path / "set")) for path in (tmp_path / "set").rglob("*.tar")}
    assert document["parameters"] == {"dataset": "test", "max_samples_per_shard": 2}
