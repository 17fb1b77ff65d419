"""The shard cache: right bytes whatever happens, each byte fetched once, and never more than the limit on the disk."""

import errno
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import Nginx, Odd, serve_range, wait_for

from vlm_train.data import cache as module
from vlm_train.data import entries
from vlm_train.data.cache import CachedFile, ShardCache
from vlm_train.data.files import StorageOptions
from vlm_train.data.ranges import coalesce
from vlm_train.data.remote import RemoteFile
from vlm_train.data.storage import Stat, open_file

SIZE = 1_000_001
CONTENT = np.random.default_rng(4).bytes(SIZE)
OPTIONS = StorageOptions(retry_seconds=20, timeout_seconds=20)
PLENTY = 10**9


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 50_000)
    monkeypatch.setattr(module, "BATCH", 200_000)


@pytest.fixture
def warnings(lines_of):
    module._warned.clear()
    return lines_of(module.log)


@pytest.fixture
def server():
    with Odd(CONTENT) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return ShardCache(PLENTY, tmp_path / "cache")


def file_of(server, cache, **how):
    return CachedFile(RemoteFile(f"{server.url}/000.tar", OPTIONS), cache, **how)


def bytes_of(ranges):
    return [CONTENT[offset : offset + length] for offset, length in ranges]


def test_a_shard_is_fetched_once(server, cache):
    file = file_of(server, cache)
    assert file.read(10, 20) == CONTENT[10:30] and file.name == "000.tar"
    assert file.remote.bytes_read == SIZE
    asked = len(server.paths)
    assert file.read(0, 2 * SIZE) == CONTENT and file.read(SIZE, 3) == b""
    assert len(server.paths) == asked
    again = file_of(server, cache)
    assert again.read_many([(5, 5), (SIZE - 2, 9), (7, 0)]) == [CONTENT[5:10], CONTENT[-2:], b""]
    assert again.remote.bytes_read == 0 and again.remote.requests == 1  # what version it has


def test_open_file_uses_the_cache_unless_told_not_to(server, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_TRAIN_CACHE", str(tmp_path))
    assert open_file(f"{server.url}/000.tar").read(1, 5) == CONTENT[1:6]
    assert len(list((tmp_path / "shards").glob("*.shard"))) == 1
    file = open_file(f"{server.url}/000.tar", StorageOptions(cache_gb=0))
    assert isinstance(file, RemoteFile) and file.read(1, 5) == CONTENT[1:6] and file.bytes_read == 5
    known = open_file(f"{server.url}/000.tar", OPTIONS, stat=file.stat())
    asked = len(server.paths)
    assert known.read(1, 5) == CONTENT[1:6] and len(server.paths) == asked


def test_few_kept_ranges_are_fetched_alone(server, cache):
    kept = [(start, 4000) for start in range(0, SIZE - 4000, 40_000)]
    file = file_of(server, cache, kept=lambda: kept)
    assert file.read_many(kept[3:7]) == bytes_of(kept[3:7])
    assert file.remote.bytes_read == sum(length for _, length in coalesce(kept)) <= 1.15 * 4000 * len(kept)
    fetched, asked = file.remote.bytes_read, len(server.paths)
    assert file.read_many(kept[::-1]) == bytes_of(kept[::-1]) and len(server.paths) == asked
    assert cache.used() < SIZE / 2
    assert file.read_many([(20_000, 70), kept[0]]) == bytes_of([(20_000, 70), kept[0]])  # the first is not of the plan
    assert file.remote.bytes_read == fetched + 70


def test_many_kept_ranges_are_the_whole_shard(server, cache):
    kept = [(start, 20_000) for start in range(0, SIZE - 20_000, 39_000)]
    file = file_of(server, cache, kept=lambda: kept)
    assert file.read_many(kept) == bytes_of(kept) and file.remote.bytes_read == SIZE


RANGES = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 60_000)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RANGES, st.lists(RANGES, max_size=4), st.integers(0, 10**9))
def test_any_reading_of_any_plan_gives_the_bytes(server, small_batches, tmp_path, kept, reads, number):
    cache = ShardCache(PLENTY, tmp_path / str(number))
    file = file_of(server, cache, kept=lambda: kept)
    for wanted in [*reads, kept, *reads]:
        assert file.read_many(wanted) == bytes_of(wanted)
    fetched = file.remote.bytes_read
    assert file.read_many(kept) == bytes_of(kept) and file.remote.bytes_read == fetched


def test_only_what_is_touched_is_fetched(server, cache, small_batches):
    file = file_of(server, cache)
    assert file.read(450_000, 10) == CONTENT[450_000:450_010] and file.remote.bytes_read == 200_000
    assert file.read(599_999, 2) == CONTENT[599_999:600_001] and file.remote.bytes_read == 400_000
    assert file.read(0, SIZE) == CONTENT and file.remote.bytes_read == SIZE


def test_a_changed_object_is_another_entry(cache):
    version = '"one"'
    with Odd(CONTENT, lambda handler, number: serve_range(handler, content, etag=version)) as server:
        content, file = CONTENT, file_of(server, cache)
        assert file.read(0, 100) == CONTENT[:100]
        content, version = CONTENT[::-1], '"two"'
        assert file.read(0, 100) == CONTENT[:100]  # as it was indexed, until somebody asks
        assert file.stat().version == '"two"'
        assert file.read(0, 100) == CONTENT[::-1][:100]


def test_nothing_is_kept_of_an_object_that_changes_while_it_is_fetched(cache, small_batches):
    def behave(handler, number):  # 1 stat, 2-5 the first batch, 6 stat, ...
        return serve_range(handler, CONTENT if number < 9 else CONTENT[::-1], etag='"one"' if number < 9 else '"two"')

    with Odd(CONTENT, behave) as server:
        stat = RemoteFile(f"{server.url}/000.tar", OPTIONS).stat()
        file = CachedFile(RemoteFile(f"{server.url}/000.tar", OPTIONS, stat), cache)
        file.read(0, SIZE)
        assert not cache.path(file.location, stat).exists()
        again = file_of(server, cache)
        assert again.read(0, SIZE) == CONTENT[::-1]


def test_what_does_not_fit_is_read_through(server, tmp_path):
    cache = ShardCache(SIZE // 2, tmp_path / "cache")
    ranges = [(start, 100) for start in range(0, SIZE, 90_000)]
    for how in ({}, {"kept": lambda: ranges, "window_bytes": SIZE}):
        file = file_of(server, cache, **how)
        assert file.read_many(ranges) == bytes_of(ranges) == file.read_many(ranges)
        assert file.remote.bytes_read == 2 * 100 * len(ranges) and not cache.folder.exists()
    assert file_of(server, cache, kept=lambda: ranges).read_many(ranges) == bytes_of(ranges) and cache.used() > 0


def test_a_full_disk_is_said_once_and_does_not_stop_anything(server, cache, monkeypatch, warnings):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for _ in range(2):
        file = file_of(server, cache)
        assert file.read(3, 30) == CONTENT[3:33] and file.read(3, 30) == CONTENT[3:33]
        assert file.remote.bytes_read == 60
    assert len(warnings) == 1 and "the disk is full" in warnings[0] and str(cache.folder) in warnings[0]


def test_a_folder_that_cannot_be_made_is_said_once(server, tmp_path, warnings):
    (tmp_path / "file").touch()
    for _ in range(2):
        assert file_of(server, ShardCache(PLENTY, tmp_path / "file" / "shards")).read(3, 30) == CONTENT[3:33]
    assert len(warnings) == 1 and "without the cache" in warnings[0]


def test_an_error_of_the_server_is_not_taken_for_the_disks(cache, warnings):
    def behave(handler, number):
        if number > 1:
            handler.send_error(404)
            return True

    with Odd(CONTENT, behave) as server, pytest.raises(FileNotFoundError, match="the server has no such file"):
        file_of(server, cache).read(0, 10)
    assert warnings == []


def test_rows_that_are_torn_or_absurd_do_not_count(server, cache):
    file = file_of(server, cache)
    assert file.read(0, 1) == CONTENT[:1]
    path = cache.path(file.location, file.stat())
    with open(path, "r+b") as entry:
        entry.truncate(entries.pages(SIZE) + 9)
        entry.seek(1000)
        entry.write(bytes(1000))
    assert file.read(1000, 1000) == bytes_of([(1000, 1000)])[0]  # the row was torn, so the damage is not read
    assert file.remote.bytes_read == 2 * SIZE
    with open(path, "r+b") as entry:
        entry.seek(entries.pages(SIZE))
        entry.write(np.array([[5, 5], [9, 3], [0, SIZE + 1]], "<u8").tobytes())
    assert not entries.has(path, SIZE, [(0, 10)])


def test_the_wrong_twin_believes_the_size_of_the_file(server, cache):
    """Why there is a table: a reserved file looks whole."""
    cache.folder.mkdir()
    path = cache.path(f"{server.url}/000.tar", Stat(SIZE, '"one"'))
    with open(path, "wb") as entry:
        os.posix_fallocate(entry.fileno(), 0, SIZE)
    assert path.stat().st_size == SIZE and path.read_bytes() != CONTENT
    assert file_of(server, cache).read(0, SIZE) == CONTENT


# Several processes


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:03d}.tar").write_bytes(CONTENT[number:] + CONTENT[:number])
    return folder


def _read_some(url, folder, limit, seed, num_reads, answers):
    random = np.random.default_rng(seed)
    cache, right, fetched = ShardCache(limit, folder), 0, 0
    for _ in range(num_reads):
        number, place = int(random.integers(12)) if num_reads > 1 else 0, int(random.integers(SIZE - 5000))
        file = CachedFile(RemoteFile(f"{url}/{number:03d}.tar", OPTIONS), cache)
        content = CONTENT[number:] + CONTENT[:number]
        right += file.read(place, 5000) == content[place : place + 5000]
        fetched += file.remote.bytes_read
    answers.put((right, fetched))


def processes_of(*arguments, num=4):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    started = [
        context.Process(target=_read_some, args=(*arguments[:3], seed, arguments[3], answers)) for seed in range(num)
    ]
    for process in started:
        process.start()
    return started, answers


def test_processes_that_want_one_shard_fetch_it_once(served, tmp_path):
    with Nginx(served, tmp_path / "nginx", extra="limit_rate 1m;") as nginx:
        started, answers = processes_of(nginx.url, tmp_path / "cache", PLENTY, 1)
        found = [answers.get(timeout=30) for _ in started]
        for process in started:
            process.join(timeout=10)
        assert [right for right, _ in found] == [1] * 4
        assert sum(fetched for _, fetched in found) == SIZE
        assert nginx.body_bytes(at_least=SIZE) < SIZE + 100  # and a few stats


def test_a_download_that_was_killed_leaves_nothing_to_believe(served, tmp_path):
    cache = ShardCache(PLENTY, tmp_path / "cache")
    with Nginx(served, tmp_path / "nginx", extra="limit_rate 200k;") as nginx:
        (victim,), _ = processes_of(nginx.url, cache.folder, PLENTY, 1, num=1)
        wait_for(lambda: cache.folder.exists() and cache.used() >= SIZE)
        time.sleep(0.5)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(timeout=10)
        assert victim.exitcode == -signal.SIGKILL
        (entry,) = cache.folder.glob("*.shard")
        assert entry.stat().st_size >= SIZE and entry.read_bytes()[:SIZE] != CONTENT  # it would look whole
    with Nginx(served, tmp_path / "other") as nginx:
        remote = RemoteFile(f"{nginx.url}/000.tar", OPTIONS)
        os.rename(entry, cache.path(remote.location, remote.stat()))  # another port is another location
        assert CachedFile(remote, cache).read(0, SIZE) == CONTENT
        assert cache.used() <= SIZE + 4 * entries.PAGE


@pytest.mark.parametrize("limit", [3_300_000, PLENTY])
def test_the_limit_holds_while_many_fetch(served, tmp_path, limit):
    """With a limit that does not bind, the same watch sees more: it does look."""
    cache, most = ShardCache(limit, tmp_path / "cache"), 0
    with Nginx(served, tmp_path / "nginx") as nginx:
        started, answers = processes_of(nginx.url, cache.folder, limit, 30)
        while any(process.is_alive() for process in started) and answers.qsize() < 4:
            most = max(most, cache.used() if cache.folder.exists() else 0)
        found = [answers.get(timeout=30) for _ in started]
        for process in started:
            process.join(timeout=10)
    assert [right for right, _ in found] == [30] * 4
    assert most > 2 * SIZE
    assert (most <= limit) if limit < PLENTY else (most > 2 * 3_300_000)


def test_what_was_used_last_stays(server, tmp_path):
    cache = ShardCache(3 * SIZE + 100_000, tmp_path / "cache")
    files = [CachedFile(RemoteFile(f"{server.url}/{number}.tar", OPTIONS), cache) for number in range(4)]
    for age, file in enumerate(files[:3]):
        file.read(0, 1)
        path = cache.path(file.location, file.stat())
        os.utime(path, (time.time() - 1000 + age,) * 2)
    files[0].read(0, 1)  # the oldest is used again
    with open(cache.path(files[1].location, files[1].stat()), "rb") as reader:
        files[3].read(0, 1)
        assert [cache.path(file.location, file.stat()).exists() for file in files] == [True, False, True, True]
        assert reader.read(SIZE) == CONTENT  # an open file outlives its name


def test_who_waits_too_long_reads_for_himself(server, cache):
    patient = CachedFile(RemoteFile(f"{server.url}/000.tar", StorageOptions(retry_seconds=0.3)), cache)
    stat = patient.stat()
    cache.folder.mkdir()
    with entries.locked(cache.path(patient.location, stat), 1, lambda: False) as descriptor:
        assert descriptor is not None
        began = time.monotonic()
        assert patient.read(0, 10) == CONTENT[:10]
        assert time.monotonic() - began > 0.25 and patient.remote.bytes_read == 10
    assert patient.read(0, 10) == CONTENT[:10] and patient.remote.bytes_read == 10 + SIZE


def test_threads_share_the_work(server, cache):
    files = [file_of(server, cache) for _ in range(6)]
    answers = []
    threads = [threading.Thread(target=lambda file=file: answers.append(file.read(7, 70))) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert answers == [CONTENT[7:77]] * 6 and sum(file.remote.bytes_read for file in files) == SIZE
