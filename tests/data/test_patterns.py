"""What may stand for shards: paths, globs, ranges, folders, and URLs."""

import os
from pathlib import Path

import pytest
from data_fixtures import encoded, members_of, pixels, write_tar

from vlm_train.data.patterns import expand_shards
from vlm_train.errors import DataError


@pytest.fixture
def shards(tmp_path):
    for name in ("a/000.tar", "a/001.tar", "a/002.tar", "a/x.beton", "b/x.tar", "c/1.beton", "c/0.beton"):
        write_tar(tmp_path / name, members_of("k", 0))
    return tmp_path


def names(patterns, folder):
    found = expand_shards(patterns)
    assert all(type(location) is str and os.path.isabs(location) for location in found)
    return [str(Path(location).relative_to(folder)) for location in found]


def test_local_patterns(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards))
    everything = ["a/000.tar", "a/001.tar", "a/002.tar"]
    assert names(f"{shards}/a/{{000..002}}.tar", shards) == everything
    assert names(f"{shards}/a/*.tar", shards) == names(f"{shards}/a", shards) == names("~/a", shards) == everything
    assert names(f"{shards}/a/00?.tar", shards) == everything
    assert names(f"{shards}/{{b/x,a/001}}.tar", shards) == ["b/x.tar", "a/001.tar"]
    assert names([f"{shards}/b::{shards}/a/000.tar", f"{shards}/a"], shards) == ["b/x.tar", *everything]
    assert names(f"{shards}/c", shards) == ["c/0.beton", "c/1.beton"]
    assert names(f"{shards}/a/x.beton", shards) == ["a/x.beton"]
    monkeypatch.chdir(shards)
    assert names("a/../b/x.tar", shards) == ["b/x.tar"]


def test_what_is_missing_is_listed(shards):
    with pytest.raises(DataError, match="3 shards are missing") as caught:
        expand_shards(f"{shards}/a/{{001..005}}.tar")
    assert caught.value.got.count(".tar") == 3 and "003.tar" in caught.value.got
    with pytest.raises(DataError, match="no shards"):
        expand_shards([])
    with pytest.raises(DataError, match="90 shards are missing") as caught:
        expand_shards(f"{shards}/{{10..99}}.tar")
    assert "80 more" in caught.value.got


@pytest.mark.parametrize("table", ["captions.csv", "captions.json", "captions.jsonl", "captions.parquet"])
def test_a_folder_with_a_table_is_a_shard(tmp_path, table):
    (tmp_path / table).touch()
    assert expand_shards(str(tmp_path)) == expand_shards(f"{tmp_path}/") == [str(tmp_path)]


def test_a_folder_with_images_and_texts_is_a_shard(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/one.jpg").write_bytes(encoded(pixels(0)))
    with pytest.raises(DataError, match="1 shards are missing"):  # pictures alone teach nothing
        expand_shards(str(tmp_path))
    (tmp_path / "deep/one.txt").write_text("one")
    assert expand_shards(str(tmp_path)) == [str(tmp_path)]
    write_tar(tmp_path / "000.tar", members_of("k", 0))
    assert expand_shards(str(tmp_path)) == [str(tmp_path / "000.tar")]


def test_urls_are_taken_as_they_are():
    assert expand_shards("https://h/a/{08..11}.tar") == [f"https://h/a/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_shards("http://h/{a,b}/{0..1}.beton") == [f"http://h/{x}/{n}.beton" for x in "ab" for n in (0, 1)]
    assert expand_shards("s3://b/{0..1}.tar::gs://c/x.tar") == ["s3://b/0.tar", "s3://b/1.tar", "gs://c/x.tar"]
    assert expand_shards("http://[::1]:8000/0.tar::http://[::1]/1.tar") == [
        "http://[::1]:8000/0.tar",
        "http://[::1]/1.tar",
    ]
    assert expand_shards("https://h/0.tar::https://h/0.tar") == ["https://h/0.tar"]


def test_queries_are_not_patterns():
    signed = "https://h/000.tar?X-Sig=a*b{c,d}[e]?f::g"
    assert expand_shards(signed) == [signed]
    assert expand_shards(f"{signed}::https://h/1.tar?x") == [signed, "https://h/1.tar?x"]
    assert expand_shards("https://h/get?file={0..1}.tar&x={a,b}") == [
        f"https://h/get?file={n}.tar&x={{a,b}}" for n in "01"
    ]
    assert expand_shards("https://h/{0,1}.tar?x={y,z}") == [f"https://h/{n}.tar?x={{y,z}}" for n in "01"]


@pytest.mark.parametrize(
    "name", ["https://u:hush@h/a/*.tar?s=hush", "https://h/a/[01].tar", "https://h/a/", "http://h/a", "https://h"]
)
def test_the_web_has_no_listing(name):
    with pytest.raises(DataError, match="HTTP has no listing") as caught:
        expand_shards(name)
    assert "{00000..00012}" in caught.value.remedy and "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["pipe:curl https://h/0.tar", "ftp://h/0.tar", "file:///data/0.tar", "hdfs://h/{0..3}.tar"]
)
def test_other_schemes_are_refused(name):
    with pytest.raises(DataError, match=f"cannot be read from {name.partition(':')[0]}:") as caught:
        expand_shards(["https://h/0.tar", name])
    assert "s3://" in caught.value.allowed


def test_a_path_may_look_a_little_like_a_url(tmp_path):
    path = write_tar(tmp_path / "https:" / "0:1.tar", members_of("k", 0))
    assert expand_shards(str(path)) == [str(path)]
