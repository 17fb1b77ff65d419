"""Local files: exact ranges, few descriptors, files that change under their name; and words about locations."""

import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest
from promptly import promptly

from vlm_train.data import local
from vlm_train.data.indexing import open_manifest
from vlm_train.data.local import read_fully
from vlm_train.data.storage import LocalFile, Stat, open_file, stat_files
from vlm_train.errors import DataError
from vlm_train.locations import identity, is_remote, name_of, scrubbed, server_of, shown

CONTENT = np.random.default_rng(1).bytes(100_000)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "00000.tar"
    path.write_bytes(CONTENT)
    return path


def test_ranges_of_a_local_file(path):
    file = open_file(str(path))
    assert (file.location, file.name) == (str(path), "00000.tar")
    assert file.stat() == Stat(size=100_000, version=str(path.stat().st_mtime_ns))
    assert file.read(10, 20) == CONTENT[10:30]
    assert file.read(99_990, 50) == CONTENT[-10:] and file.read(100_000, 5) == b""
    assert file.read_many([(500, 7), (0, 3), (500, 7), (4, 0)]) == [
        CONTENT[500:507],
        CONTENT[:3],
        CONTENT[500:507],
        b"",
    ]
    assert stat_files([file, file]) == [file.stat()] * 2
    assert pickle.loads(pickle.dumps(file)).read(0, 9) == CONTENT[:9]


def test_short_reads_are_continued(path, monkeypatch):
    descriptor, pread = os.open(path, os.O_RDONLY), os.pread
    monkeypatch.setattr(os, "pread", lambda number, length, offset: pread(number, min(length, 7), offset))
    assert os.pread(descriptor, 50, 0) != CONTENT[:50]
    assert read_fully(descriptor, 0, 50) == CONTENT[:50]
    assert read_fully(descriptor, 99_990, 50) == CONTENT[-10:]
    os.close(descriptor)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        open_file(str(tmp_path / "gone.tar")).read(0, 1)
    with pytest.raises(OSError, match=tmp_path.name):
        open_file(str(tmp_path)).read(0, 1)


def test_a_pipe_is_no_file_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "link.tar").symlink_to("a.tar")
    for name in ("a.tar", "link.tar", "/dev/zero"):
        file = LocalFile(str(tmp_path / name))
        for ask in (file.stat, lambda file=file: file.read(0, 1)):
            with promptly(), pytest.raises(OSError, match="Not a regular file"):
                ask()
    with promptly(), pytest.raises(DataError, match=r"a\.tar"):
        open_manifest(str(tmp_path / "a.tar"))


def test_a_lent_file_is_waited_for(path, monkeypatch):
    opened = os.open

    def lent(name, flags):
        if flags & os.O_NONBLOCK:
            raise BlockingIOError(11, "lent to another machine")
        return opened(name, flags)

    monkeypatch.setattr(os, "open", lent)
    local._open_files.clear()
    assert LocalFile(str(path)).read(0, 3) == CONTENT[:3]


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_MAX_OPEN_FILES", 3)
    local._open_files.clear()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    files = [LocalFile(str(tmp_path / str(number))) for number in range(10)]
    assert [file.read(0, 1)[0] for _ in range(2) for file in files] == [*range(10), *range(10)]
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_a_file_in_use_stays_open_while_others_push_it_out(path, monkeypatch):
    monkeypatch.setattr(local, "_MAX_OPEN_FILES", 1)
    (path.parent / "other").write_bytes(b"other")
    wrong, file, other = [], LocalFile(str(path)), LocalFile(str(path.parent / "other"))

    def read(one, expected):
        wrong.extend(None for _ in range(3000) if one.read(0, 5) != expected)

    threads = [threading.Thread(target=read, args=(file, CONTENT[:5])) for _ in range(2)]
    threads += [threading.Thread(target=read, args=(other, b"other")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []


def test_a_replaced_file_is_opened_anew_and_a_removed_one_missed(path):
    file = LocalFile(str(path))
    assert file.read(0, 3) == CONTENT[:3]
    (path.parent / "new").write_bytes(b"new")
    os.replace(path.parent / "new", path)
    assert file.read(0, 3) == b"new"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.read(0, 3)


def _read(location, queue):
    queue.put([LocalFile(location).read(offset, 11) for offset in range(0, 90_000, 1000)])


def test_descriptors_survive_a_fork(path):
    expected = [CONTENT[offset : offset + 11] for offset in range(0, 90_000, 1000)]
    assert LocalFile(str(path)).read(0, 11) == expected[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read, args=(str(path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [LocalFile(str(path)).read(offset, 11) for offset in range(0, 90_000, 1000)] == expected
    assert [queue.get(timeout=30) for _ in processes] == [expected, expected]
    for process in processes:
        process.join(timeout=30)


SIGNED = "https://user:secret@host:8443/a%20b/000.tar?X-Amz-Signature=secret&part=7&Expires=12"


def test_what_is_shown_of_a_location():
    assert shown(SIGNED) == "https://host:8443/a%20b/000.tar" and name_of(SIGNED) == "000.tar"
    assert server_of(SIGNED) == "https://host:8443" and server_of("s3://bucket/k/0.tar") == "s3://bucket"
    assert shown("/data/a?b/000.tar") == "/data/a?b/000.tar" and name_of("/data/000.tar") == "000.tar"
    assert shown("s3://bucket/what?/a#1.tar") == "s3://bucket/what?/a#1.tar"
    assert name_of("s3://bucket/what?/a#1.tar") == "a#1.tar"
    assert scrubbed(f"no way to <{SIGNED}> or '{SIGNED}', sorry").count("secret") == 0
    assert (
        is_remote("gs://b/x") and is_remote("HTTPS://h/x") and not is_remote("/https/x") and not is_remote("ftp://h/x")
    )


def test_identity_forgets_signatures_and_nothing_else():
    other = SIGNED.replace("secret", "other").replace("12", "13")
    assert identity(SIGNED) == identity(other) == "https://host:8443/a%20b/000.tar?part=7"
    assert identity(SIGNED) != identity(SIGNED.replace("part=7", "part=8"))
    assert identity("/data/x.tar") == "/data/x.tar"
