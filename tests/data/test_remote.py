"""Servers as they are: slow, gone for a while, broken for good, or without ranges."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from servers import S3, Nginx, Odd, free_port, hang_up, refuse, serve_range, stall

from vlm_train.data import retry
from vlm_train.data.files import StorageOptions
from vlm_train.data.patterns import expand_shards
from vlm_train.data.ranges import coalesce
from vlm_train.data.remote import PIECE, RemoteFile, find
from vlm_train.data.storage import Stat, open_file, stat_files
from vlm_train.errors import DataError

CONTENT = np.random.default_rng(2).bytes(3_000_000)
QUICK = StorageOptions(cache_gb=0, retry_seconds=20, timeout_seconds=20)
AT_ONCE = StorageOptions(cache_gb=0, retry_seconds=0, timeout_seconds=20)


@pytest.fixture
def warnings(lines_of):
    return lines_of(retry.log)


@pytest.fixture(scope="module")
def nginx(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "a b").mkdir()
    (folder / "000.tar").write_bytes(CONTENT)
    (folder / "a b" / "100%.tar").write_bytes(CONTENT[:1000])
    (folder / "empty.tar").touch()
    with Nginx(folder, tmp_path_factory.mktemp("nginx"), extra="limit_rate 2m;") as server:
        yield server


def ranges_of(number, length=2000, seed=0):
    starts = np.random.default_rng(seed).integers(0, len(CONTENT) - length, number)
    return [(int(start), length) for start in starts]


def cut_of(ranges):
    return [CONTENT[offset : offset + length] for offset, length in ranges]


def test_ranges_from_nginx(nginx):
    file = open_file(f"{nginx.url}/000.tar", QUICK)
    stat = file.stat()
    assert stat.size == len(CONTENT) and stat.version.startswith('"')
    assert file.read(5, 10) == CONTENT[5:15]
    assert file.read(len(CONTENT) - 3, 10) == CONTENT[-3:] and file.read(len(CONTENT) + 5, 10) == b""
    ranges = [*ranges_of(50), (0, 0), (17, 1)]
    assert file.read_many(ranges) == cut_of(ranges) and file.read_many([]) == []
    other = pickle.loads(pickle.dumps(file))
    assert other.read(0, 4) == CONTENT[:4] and other.stat() == stat
    assert stat_files([file, open_file(f"{nginx.url}/empty.tar", QUICK)])[1].size == 0
    assert open_file(f"{nginx.url}/empty.tar", QUICK).read(0, 10) == b""
    assert open_file(f"{nginx.url}/a%20b/100%25.tar", QUICK).read(0, 10) == CONTENT[:10]


def test_bytes_read_stay_below_1_2_times_the_bytes_kept(nginx):
    """By the server's own count, at 10 % kept, with the shape of real shards."""
    generator = np.random.default_rng(3)
    lengths = generator.integers(2_000, 30_000, 180)
    starts = np.cumsum(lengths) - lengths
    kept = generator.permutation(180)[:18]
    ranges = [(int(starts[i]), int(lengths[i])) for i in kept]
    before = nginx.body_bytes()
    file = RemoteFile(f"{nginx.url}/000.tar", QUICK)
    assert file.read_many(ranges) == cut_of(ranges)
    wanted = sum(length for _, length in ranges)
    sent = nginx.body_bytes(at_least=before + file.bytes_read) - before
    assert wanted <= sent <= 1.2 * wanted
    assert file.requests == 1 + len(coalesce(ranges))


def _read_slowly(url, options, results):
    file, ranges = RemoteFile(url, options, Stat(len(CONTENT), "")), ranges_of(40, 100_000, seed=1)
    try:
        results.append([file.read(*item) for item in ranges] == cut_of(ranges))
    except OSError as error:
        results.append(error)


@pytest.mark.parametrize("patient", [True, False])
def test_nginx_killed_in_the_middle_loses_nothing(tmp_path, warnings, patient):
    """The wrong twin has no patience, and loses the read."""
    (tmp_path / "000.tar").write_bytes(CONTENT)
    nginx = Nginx(tmp_path, tmp_path / "nginx", extra="limit_rate 1m;").start()
    try:
        results = []
        arguments = (f"{nginx.url}/000.tar", QUICK if patient else AT_ONCE, results)
        reader = threading.Thread(target=_read_slowly, args=arguments)
        reader.start()
        while len(nginx.log()) < 10:
            time.sleep(0.01)
        nginx.kill()
        time.sleep(3 if patient else 0)
        if patient:
            assert reader.is_alive()
            nginx.start()
        reader.join(timeout=40)
    finally:
        nginx.kill()
    if patient:
        assert results == [True]
        assert len(warnings) == 2  # one when it went, one when it came back
        assert f"127.0.0.1:{nginx.port} does not answer" in warnings[0] and "answers again after" in warnings[1]
    else:
        assert isinstance(results[0], OSError) and "did not answer in 1 tries" in str(results[0])


TROUBLE = {
    "503": lambda handler: refuse(handler, 503),
    "429": lambda handler: refuse(handler, 429),
    "reset": hang_up,
    "short": lambda handler: serve_range(handler, CONTENT, num_sent=7) and hang_up(handler),
    "stall": stall,
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_that_passes(trouble, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.02)
    options = StorageOptions(cache_gb=0, retry_seconds=20, timeout_seconds=0.3 if trouble == "stall" else 5)
    with Odd(CONTENT, lambda handler, number: TROUBLE[trouble](handler) if number <= 3 else None) as server:
        file = RemoteFile(f"{server.url}/000.tar", options, Stat(len(CONTENT), ""))
        assert file.read(1000, 50_000) == CONTENT[1000:51_000]
        assert len(server.paths) == 4
        impatient = StorageOptions(cache_gb=0, retry_seconds=0, timeout_seconds=options.timeout_seconds)
        server.paths.clear()
        with pytest.raises(OSError, match="did not answer in 1 tries"):
            RemoteFile(f"{server.url}/000.tar", impatient, Stat(len(CONTENT), "")).read(1000, 50_000)


def test_a_server_that_drips_has_stalled_too(monkeypatch):
    monkeypatch.setattr(retry, "MIN_RATE", 1e9)

    def drip(handler, number):
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-999/{len(CONTENT)}")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)

    with Odd(CONTENT, drip) as server:
        options = StorageOptions(cache_gb=0, retry_seconds=0, timeout_seconds=0.4)
        with pytest.raises(OSError, match="no answer in time"):
            RemoteFile(f"{server.url}/000.tar", options, Stat(len(CONTENT), "")).read(0, 1000)


def test_a_long_outage_is_told_now_and_then(warnings, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(retry, "WARN_EVERY", 0.4)
    options = StorageOptions(cache_gb=0, retry_seconds=1.5)
    with Odd(CONTENT, lambda handler, number: refuse(handler, 503)) as server:
        ranges = [(start, 10) for start in range(0, 2_000_000, 100_000)]
        with pytest.raises(OSError, match="did not answer"):
            RemoteFile(f"{server.url}/000.tar", options, Stat(len(CONTENT), "")).read_many(ranges)
        assert 2 <= len(warnings) <= 4 < len(server.paths)
        assert all("status 503; trying again" in line for line in warnings)


def test_waiting_grows_to_15_seconds_and_touches_no_generator():
    state = random.getstate()
    waits = list(itertools.islice(retry._delays(), 12))
    assert all(0.5 <= wait <= 15 for wait in waits) and waits[0] < 1 and waits[1:] != waits[:-1] and waits[-1] == 15
    assert random.getstate() == state


def test_a_dead_server_uses_up_its_time_once(warnings, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.05)
    options = StorageOptions(cache_gb=0, retry_seconds=1.0)
    with Odd(CONTENT, lambda handler, number: refuse(handler, 503) if dead else None) as server:
        dead, file = True, RemoteFile(f"{server.url}/000.tar", options, Stat(len(CONTENT), ""))
        with pytest.raises(OSError, match=r"did not answer in \d tries over \d s \(status 503\)"):
            file.read(0, 10)
        assert len(server.paths) > 1 and len(warnings) == 1
        for _ in range(20):
            tries = len(server.paths)
            with pytest.raises(OSError, match="in 1 tries"):
                file.read(0, 10)
            assert len(server.paths) == tries + 1
        dead = False
        assert file.read(0, 10) == CONTENT[:10]
        dead, tries = True, len(server.paths)
        with pytest.raises(OSError, match="did not answer"):
            file.read(0, 10)
        assert len(server.paths) > tries + 1  # it has its time again
        assert len([line for line in warnings if "does not answer" in line]) == 1  # not one line a read


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_what_is_final_is_final_at_once(status):
    kinds = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError, 400: OSError}
    with Odd(CONTENT, lambda handler, number: refuse(handler, status)) as server:
        for ask in (lambda file: file.stat(), lambda file: file.read(0, 10)):
            with pytest.raises(kinds[status], match=r"000\.tar"):
                ask(RemoteFile(f"{server.url}/000.tar", QUICK))
        assert len(server.paths) == 2


def whole_file(handler, number):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**10))
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(bytes(10**6))


def test_a_server_without_ranges_is_refused():
    """At once, and without taking the ten gigabytes that it offers."""
    with Odd(CONTENT, whole_file) as server:
        file = RemoteFile(f"{server.url}/000.tar", QUICK)
        for ask in (lambda: file.stat(), lambda: RemoteFile(file.location, QUICK, Stat(10**10, "")).read(5, 10)):
            with pytest.raises(DataError, match="does not give parts") as caught:
                ask()
            assert "status 200" in caught.value.got and "data.streaming=true" in caught.value.remedy


def test_a_file_that_was_cut_off_meanwhile_is_told_at_once(nginx):
    (nginx.folder / "cut.tar").write_bytes(CONTENT[:1000])
    file = RemoteFile(f"{nginx.url}/cut.tar", QUICK, Stat(len(CONTENT), ""))
    for offset in (990, 2000):
        with pytest.raises(OSError, match=r"it has 1000 bytes now.*cut\.tar"):
            file.read(offset, 100)
    assert file.requests == 2


def test_secrets_are_never_shown(warnings, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    options = StorageOptions(cache_gb=0, retry_seconds=0.1, timeout_seconds=5)
    said = []
    for status in (403, 404, 400, 503, 200):
        with Odd(CONTENT, lambda handler, number, status=status: refuse(handler, status)) as server:
            location = server.url.replace("//", "//user:hush@") + "/a/000.tar?X-Amz-Signature=hush"
            for ask in (lambda: RemoteFile(location, options).stat(), lambda: open_file(location, options).read(0, 1)):  # noqa: B023
                try:
                    ask()
                except (OSError, DataError) as error:
                    said.append("".join([str(error), repr(error), *_traceback(error)]))
            assert server.paths[0].endswith("hush")  # but it is sent
    location = f"http://user:hush@127.0.0.1:{free_port()}/000.tar?sig=hush"
    with pytest.raises(OSError) as caught:
        RemoteFile(location, options).stat()
    said += [str(caught.value), *_traceback(caught.value), *warnings]
    assert len(said) > 10 and "000.tar" in said[0]
    assert not [line for line in said if "hush" in line]


def test_what_libraries_say_is_scrubbed():
    said = retry.describe(ValueError("no way\nto 'https://user:hush@host/000.tar?sig=hush'"))
    assert said == "ValueError: no way to 'https://host/000.tar'"


def _traceback(error):
    import traceback

    lines = traceback.format_exception(error)
    return [line for line in lines if not line.startswith("  File")]  # the source lines of this test say it


def test_requests_run_at_once_but_not_more_than_16():
    lock, running, most = threading.Lock(), 0, 0

    def count(handler, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1

    with Odd(CONTENT, count) as server:
        file = RemoteFile(f"{server.url}/000.tar", QUICK, Stat(len(CONTENT), ""))
        ranges = [(start, 100) for start in range(0, 2_500_000, 50_000)]
        assert file.read_many(ranges) == cut_of(ranges)
        assert most == 16 and file.requests == 50 and file.bytes_read == 5000


def test_long_ranges_are_read_in_pieces(tmp_path):
    content = CONTENT * 8
    with Odd(content) as server:
        file = RemoteFile(f"{server.url}/000.tar", QUICK, Stat(len(content), ""))
        assert file.read(1, len(content)) == content[1:]
        assert len(server.paths) == -(-len(content) // PIECE) > 2


def test_nothing_is_left_running_when_a_read_fails():
    with Odd(CONTENT, lambda handler, number: refuse(handler, 404) if number == 1 else stall(handler, 3)) as server:
        file = RemoteFile(f"{server.url}/000.tar", QUICK, Stat(len(CONTENT), ""))
        began = time.monotonic()
        with pytest.raises(FileNotFoundError):
            file.read_many([(start, 100) for start in range(0, 2_500_000, 50_000)])
        assert time.monotonic() - began < 2.9  # it did not wait for the others


def _read_in_child(url, queue):
    file = RemoteFile(url, QUICK)
    queue.put(file.read(3, 50) == CONTENT[3:53])


def test_a_fork_makes_its_own_connections(nginx):
    url = f"{nginx.url}/000.tar"
    file = RemoteFile(url, QUICK)
    assert file.read(0, 10) == CONTENT[:10]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(url, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert file.read_many(ranges_of(20)) == cut_of(ranges_of(20))
    assert [queue.get(timeout=30) for _ in children] == [True] * 3
    for child in children:
        child.join(timeout=10)
    assert [child.exitcode for child in children] == [0] * 3
    assert file.read_many(ranges_of(20, seed=9)) == cut_of(ranges_of(20, seed=9))


EXIT = """
import os, sys
from vlm_train.data.remote import RemoteFile
from vlm_train.data.files import StorageOptions
file = RemoteFile(sys.argv[1], StorageOptions())
assert len(file.read(0, 10)) == 10
if sys.argv[2] == "fork" and os.fork() == 0:
    assert len(file.read(0, 10)) == 10
"""


@pytest.mark.parametrize("way", ["plain", "fork"])
def test_the_interpreter_ends_quietly(nginx, way):
    command = [sys.executable, "-X", "dev", "-W", "error", "-W", "default::DeprecationWarning", "-c", EXIT]
    done = subprocess.run([*command, f"{nginx.url}/000.tar", way], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_is_heard_while_a_server_stalls():
    with Odd(CONTENT, lambda handler, number: stall(handler, 60)) as server:
        command = [sys.executable, "-c", EXIT, f"{server.url}/000.tar", "plain"]
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background ignores it
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
        while not server.paths:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=40)
        assert "KeyboardInterrupt" in errors and process.returncode != 0


# S3


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto.server")
    with S3() as server:
        server.put("bucket", {"train/000.tar": CONTENT, "train/001.tar": b"", "train/x.txt": b"x", "b/0.beton": b"b"})
        yield server


def test_s3(s3):
    file = open_file("s3://bucket/train/000.tar", QUICK)
    stat = file.stat()
    assert stat.size == len(CONTENT)
    assert file.read_many(ranges_of(30)) == cut_of(ranges_of(30))
    assert file.read(len(CONTENT) - 3, 10) == CONTENT[-3:]
    assert open_file("s3://bucket/train/001.tar", QUICK).read(0, 10) == b""
    s3.put("bucket", {"train/002.tar": b"one"})
    before = open_file("s3://bucket/train/002.tar", QUICK).stat()
    s3.put("bucket", {"train/002.tar": b"two"})
    after = open_file("s3://bucket/train/002.tar", QUICK).stat()
    assert before.size == after.size and before.version != after.version
    for missing in ("s3://bucket/train/003.tar", "s3://nowhere/train/000.tar"):
        with pytest.raises(FileNotFoundError, match=missing):
            open_file(missing, QUICK).stat()
        with pytest.raises(FileNotFoundError, match=missing):
            RemoteFile(missing, QUICK, Stat(100, "")).read(0, 10)


def test_s3_listing(s3):
    tars = [f"s3://bucket/train/00{number}.tar" for number in range(3)]
    assert find("s3://bucket/*/*.tar", QUICK) == tars
    assert expand_shards("s3://bucket/train") == expand_shards("s3://bucket/train/") == tars
    assert expand_shards("s3://bucket/train/*[01].tar") == tars[:2]
    assert expand_shards("s3://bucket/b") == ["s3://bucket/b/0.beton"]
    with pytest.raises(DataError, match="2 shards are missing") as caught:
        expand_shards(["s3://bucket/none/*.tar", "s3://bucket/empty/"])
    assert "s3://bucket/none" in caught.value.got


@pytest.mark.parametrize("patient", [True, False])
def test_s3_gone_for_a_while(s3, patient):
    file = RemoteFile("s3://bucket/train/000.tar", QUICK if patient else AT_ONCE)
    assert file.stat().size == len(CONTENT)
    s3.stop()
    restart = threading.Timer(1.5, s3.start)
    restart.start()
    try:
        if patient:
            assert file.read_many(ranges_of(10)) == cut_of(ranges_of(10))
        else:
            with pytest.raises(OSError, match="did not answer"):
                file.read_many(ranges_of(10))
    finally:
        restart.join()


def test_s3_by_fsspecs_own_variable(s3):
    """What users of MinIO and the like may set instead of AWS_ENDPOINT_URL_S3."""
    code = "import sys; from vlm_train.data.storage import open_file; print(open_file(sys.argv[1]).stat().size)"
    environment = {**os.environ, "FSSPEC_S3_ENDPOINT_URL": s3.url}
    del environment["AWS_ENDPOINT_URL_S3"]
    command = [sys.executable, "-c", code, "s3://bucket/train/000.tar"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (str(len(CONTENT)), "")


def test_s3_without_credentials_says_which(s3, monkeypatch, tmp_path):
    code = "import sys; from vlm_train.data.storage import open_file; open_file(sys.argv[1]).stat()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL_S3": s3.url, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, "s3://bucket/train/000.tar"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].startswith("PermissionError") and "FSSPEC_S3_ANON" in done.stderr


# Google Cloud Storage: the three requests of its JSON API that are used


def gcs(objects, trouble):
    def behave(handler, number):
        if trouble(number):
            return refuse(handler, 503)
        path = handler.path.partition("?")[0]
        key = re.fullmatch(r"/(?:download/)?storage/v1/b/bucket/o(?:/(.*))?", path)[1]
        key = key and key.replace("%2F", "/")
        if key in objects and handler.headers.get("Range"):
            return serve_range(handler, objects[key])
        facts = [{"name": name, "bucket": "bucket", "size": len(objects[name]), "etag": "e"} for name in objects]
        if key is None:
            found = {"items": facts}
        elif key in objects:
            found = next(fact for fact in facts if fact["name"] == key)
        else:
            return refuse(handler, 404)
        body = json.dumps(found).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return behave


def test_google_cloud_storage(monkeypatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.02)
    objects = {"train/000.tar": CONTENT, "train/001.tar": b"1", "other/000.tar": b"2"}
    with Odd(b"", gcs(objects, lambda number: number in (1, 4, 5))) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        options = StorageOptions(cache_gb=0, retry_seconds=10, timeout_seconds=11)  # its own file system
        file = open_file("gs://bucket/train/000.tar", options)
        assert file.stat() == Stat(len(CONTENT), "e")
        assert file.read_many(ranges_of(5)) == cut_of(ranges_of(5))
        with pytest.raises(FileNotFoundError, match=r"gs://bucket/train/009\.tar"):
            open_file("gs://bucket/train/009.tar", options).stat()
        assert expand_shards("gs://bucket/train/*.tar", options) == [f"gs://bucket/train/00{n}.tar" for n in (0, 1)]


def test_an_unused_port_is_refused_in_time():
    """Nothing listens: the connection is refused, not waited for."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="did not answer in 1 tries"):
            RemoteFile(f"http://127.0.0.1:{server.getsockname()[1]}/000.tar", AT_ONCE).stat()
