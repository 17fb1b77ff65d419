"""Shards from the first byte to the last: compressed, damaged, and from servers that give no ranges."""

import base64
import bz2
import gzip
import lzma
import os

import numpy as np
import pytest
from data_fixtures import write_dataset, zstd
from hostile import TAR_END, tar_member, tar_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import S3, Odd, refuse

from vlm_train.data import tape
from vlm_train.data.files import StorageOptions
from vlm_train.data.tape import read_shard
from vlm_train.data.unpacking import unpacked

AT_ONCE = StorageOptions(cache_gb=0, retry_seconds=0, timeout_seconds=20)


CODECS = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstd}
NOISE = np.random.default_rng(3).bytes(300_000)


@pytest.fixture
def told(lines_of):
    return lines_of(tape.log)


def stored(folder, content):
    path = folder / "a.tar.packed"
    path.write_bytes(content)
    return str(path)


def read(location, options=AT_ONCE):
    """(keys, reasons) of a shard."""
    errors = []
    found = [sample.key for sample in read_shard(location, errors, options)]
    return found, [error["reason"] for error in errors]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Five samples behind much that is none, so that they lie in several pieces."""
    return (
        tar_member(b"README", NOISE)
        + (write_dataset(tmp_path_factory.mktemp("plain"), (5,)) / "00000.tar").read_bytes()
    )


KEYS = [f"00000{number}" for number in range(5)]


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_streams_one_after_the_other_are_one(tmp_path, plain, codec):
    pack, half = CODECS[codec], len(plain) // 2
    for content in (pack(plain), pack(plain[:half]) + pack(plain[half:]), pack(b"") + pack(plain)):
        assert b"".join(unpacked(stored(tmp_path, content))) == plain
        assert read(stored(tmp_path, content)) == (KEYS, [])


@pytest.mark.parametrize("codec", ["gzip", "bz2", "xz"])
def test_zeros_behind_a_compressed_stream_are_padding(tmp_path, plain, codec):
    pack = CODECS[codec]
    content = pack(plain[:5000]) + bytes(512) + pack(plain[5000:]) + bytes(10_240)
    assert b"".join(unpacked(stored(tmp_path, content))) == plain


@pytest.mark.parametrize("codec", CODECS)
def test_what_follows_a_compressed_stream_and_is_none_is_told(tmp_path, plain, codec, told):
    assert read(stored(tmp_path, CODECS[codec](plain) + b"something else")) == (KEYS, ["truncated"])
    assert len(told) == 1 and "breaks off" in told[0]


@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_stream_that_breaks_off_gives_what_came_before(tmp_path, plain, codec):
    content = CODECS[codec](plain)
    for share in (0.0, 0.3, 0.9, 0.99):
        cut = content[: max(10, int(len(content) * share))]
        found, reasons = read(stored(tmp_path, cut))
        assert (
            found == KEYS[: len(found)]
            and len(found) < 5
            and reasons[-1] in ("truncated", "no_end_marker", "shard_unreadable")
        )
    whole = gzip.compress(plain, mtime=0)
    assert read(stored(tmp_path, whole[:-8])) == (KEYS, ["truncated"])  # only the checksum of gzip is missing


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(codec=st.sampled_from(sorted(CODECS)), data=st.data())
def test_any_damage_of_a_compressed_stream_is_told_and_raises_nothing(tmp_path, codec, data):
    plain = b"".join(tar_sample(b"k%d" % number, number) for number in range(3)) + TAR_END
    content = bytearray(CODECS[codec](plain))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found, reasons = read(stored(tmp_path, bytes(content)))
    assert reasons or found == ["k0", "k1", "k2"]


def test_a_compressed_bomb_takes_no_memory(tmp_path):
    bomb = bz2.compress(bytes(64 << 20))
    assert len(bomb) < 1000 and max(map(len, unpacked(stored(tmp_path, bomb)))) <= 8 << 20


def test_a_shard_that_is_no_file_is_told(tmp_path, told):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe.tar", "folder.tar", "missing.tar"):
        assert read(str(tmp_path / name)) == ([], ["shard_unreadable"])
    assert len(told) == 3 and all("cannot be read" in line for line in told)


# --- servers ---------------------------------------------------------------------------------------------------------


def send(handler, content, num_sent=None, status=200):
    """The whole content, whatever range was asked for; or less than was said."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:num_sent])
    handler.close_connection = True
    return True


@pytest.fixture(scope="module")
def long_tar(plain):
    """Longer than any piece that is asked for at once."""
    return tar_member(b"README", NOISE * 60) + plain


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_server_without_ranges_is_read_to_the_end(long_tar, pack):
    content = pack(long_tar)
    with Odd(behave=lambda handler, number: send(handler, content)) as server:
        assert read(f"{server.url}/a.tar") == (KEYS, [])
        assert len(server.paths) == 2  # whether it gives ranges, and the body


def test_its_connection_that_breaks_costs_the_rest_of_the_shard(tmp_path, long_tar, told):
    with Odd(behave=lambda handler, number: send(handler, long_tar, len(long_tar) - 6000)) as server:
        found, reasons = read(f"{server.url}/a.tar")
    assert (found, reasons) == read(stored(tmp_path, long_tar[:-6000]))  # to the last byte
    assert 0 < len(found) < 5 and "breaks off" in told[0]


@pytest.mark.parametrize("is_chunked", [True, False], ids=["chunked", "until it closes"])
def test_a_body_of_unknown_length_is_read(tmp_path, long_tar, is_chunked):
    """In chunks its end is known, so a break is too; else only the tar tells."""

    def behave(handler, number):
        handler.send_response(200)
        if is_chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(content), 50_000):
            chunk = content[start : start + 50_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if is_chunked else chunk)
        if is_chunked and content is long_tar:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True
        return True

    with Odd(behave=behave) as server:
        for content in (long_tar, long_tar[:-6000]):
            assert read(f"{server.url}/a.tar") == read(stored(tmp_path, content))
        content = bytes(bytearray(long_tar))  # whole, but for the last chunk
        assert read(f"{server.url}/a.tar") == (KEYS, ["truncated"] if is_chunked else [])


def test_a_password_is_sent_to_its_own_server_alone(plain):
    """Also where it has signs that a URL must spell, and where the server sends one on to another."""
    secrets = []

    def behave(handler, number):
        secrets.append(handler.headers["Authorization"])
        return send(handler, plain)

    def send_on(handler, number):
        if number == 1:
            return behave(handler, number)
        handler.send_response(302)
        handler.send_header("Location", f"{other.url}/b.tar")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    with Odd(behave=behave) as other, Odd(behave=send_on) as server:
        assert read(f"{server.url.replace('//', '//us%20er:p%40ss@')}/a.tar") == (KEYS, [])
    assert secrets == ["Basic " + base64.b64encode(b"us er:p@ss").decode(), None]


def test_a_server_with_ranges_is_asked_again(long_tar, told):
    """Requests that fail are repeated: a hiccup costs nothing."""

    def hiccup(handler, number):
        return refuse(handler, 503) if number in (1, 3) else None

    with Odd(long_tar, hiccup) as server:
        assert read(f"{server.url}/a.tar", StorageOptions(cache_gb=0, retry_seconds=20)) == (KEYS, [])
    assert told == []


def test_a_bucket_is_streamed(plain):
    with S3() as server:
        server.put("shards", {"a.tar": plain, "b.tar.gz": gzip.compress(plain)})
        for name in ("a.tar", "b.tar.gz"):
            assert read(f"s3://shards/{name}") == (KEYS, [])
        assert read("s3://shards/c.tar") == ([], ["shard_unreadable"])


def test_a_server_with_ranges_that_dies_costs_the_rest_of_the_shard(long_tar, told):
    with Odd(long_tar, lambda handler, number: refuse(handler, 503) if number > 2 else None) as server:
        found, reasons = read(f"{server.url}/a.tar")
    assert found == [] and reasons == ["truncated"] and "breaks off" in told[0]


@pytest.mark.parametrize(
    "behave",
    [
        lambda handler, number: refuse(handler, 403),
        lambda handler, number: refuse(handler, 404),
        lambda handler, number: refuse(handler, 500),
        lambda handler, number: refuse(handler, 403) if number > 1 else None,
        lambda handler, number: send(handler, bytes(100_000), 50_000),
    ],
    ids=["refused", "missing", "dead", "refused later", "broken"],
)
def test_no_password_and_no_signature_is_told(long_tar, told, behave):
    with Odd(long_tar, behave) as server:
        url = server.url.replace("http://", "http://user:5ecret@")
        found, reasons = read(f"{url}/a.tar?X-Amz-Signature=5ecret&id=5ecret")
    assert found == [] and len(reasons) == 1 and len(told) == 1
    assert f"{server.url}/a.tar" in told[0] and "5ecret" not in told[0]


def test_nor_is_one_that_an_error_on_the_way_spells(monkeypatch, told):
    def breaking(location, options):
        yield TAR_END
        raise ValueError("GET 'https://user:5ecret@host/a.tar?sig=5ecret' failed")

    monkeypatch.setattr(tape, "unpacked", breaking)
    assert read("https://user:5ecret@host/a.tar?sig=5ecret") == ([], ["truncated"])
    assert told == [
        "https://host/a.tar breaks off: ValueError: GET 'https://host/a.tar' failed; what comes after is lost"
    ]


def test_the_headers_of_fsspec_are_sent(monkeypatch, plain):
    """What its configuration says of web servers counts here too."""
    from fsspec.config import conf

    monkeypatch.setitem(conf, "http", {"client_kwargs": {"headers": {"X-Token": "mine"}}})
    tokens = []

    def behave(handler, number):
        tokens.append(handler.headers["X-Token"])
        return send(handler, plain)

    with Odd(behave=behave) as server:
        assert read(f"{server.url}/a.tar")[0] == KEYS
    assert tokens[-1] == "mine"


def test_twin_parts_cannot_be_had_from_a_server_without_ranges(long_tar):
    """fsspec's own file, which streaming once used, asks for them."""
    import fsspec

    with (
        Odd(behave=lambda handler, number: send(handler, long_tar)) as server,
        pytest.raises(ValueError, match="range"),
        fsspec.open(f"{server.url}/a.tar", "rb").open() as file,
    ):
        while file.read(1 << 20):
            pass
