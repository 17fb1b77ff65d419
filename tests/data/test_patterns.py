"""What may stand for shards: paths, globs, ranges, folders, and URLs."""

import itertools
import os
import tracemalloc
from pathlib import Path

import pytest
from data_fixtures import encoded, members_of, pixels, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data import braces
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


def number_ranges():
    numbers = st.from_regex(r"-?[0-9]{1,3}", fullmatch=True)
    step = st.sampled_from(["", "..1", "..3", "..0", "..-2"])
    return st.builds("{{{}..{}{}}}".format, numbers, numbers, step)


def patterns():
    """Balanced patterns of any depth: texts, ranges, words, and braces that mean themselves."""
    letters = st.sampled_from(["{a..d}", "{x..v}", "{a..g..3}", "{C..A}"])
    leaves = st.one_of(
        st.text("ab/.,-0", max_size=4), number_ranges(), letters, st.sampled_from(["{}", "{ab}", "{1..}"])
    )
    grown = lambda inner: st.one_of(  # noqa: E731
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
        st.lists(inner, min_size=1, max_size=3).map("".join),
    )
    return st.recursive(leaves, grown, max_leaves=4)


@settings(max_examples=300, deadline=None)
@given(pattern=patterns())
def test_braces_mean_what_webdataset_reads(pattern):
    """`braceexpand` is the package that webdataset uses."""
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    expression = braces.parse(pattern)
    if braces.num_names(expression) < 20_000:
        assert list(braces.names(expression)) == list(braceexpand(pattern, escape=False))


@settings(max_examples=200, deadline=None)
@given(pattern=st.text("{},.01a", max_size=24))
def test_the_number_of_names_is_known_beforehand(pattern):
    expression = braces.parse(pattern)
    num_names = braces.num_names(expression)
    assert len(list(itertools.islice(braces.names(expression), 2000))) == min(num_names, 2000)


def test_names_are_made_one_at_a_time():
    expression = braces.parse("{0..999999999999}/{a,{000..999}}.tar")
    assert braces.num_names(expression) == 10**12 * 1001
    tracemalloc.start()
    assert list(itertools.islice(braces.names(expression), 3)) == ["0/a.tar", "0/000.tar", "0/001.tar"]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{0..999999999}.tar", "1,000,000,000 names"),
        ("{0..999}/{0..999}/{0..1}.tar", "2,000,000 names"),
        ("s3://bucket/{0..1000000}.tar", "1,000,001 names"),
        ("https://u:hush@h/x.tar?part={0..9999999}&s=hush", "10,000,000 names"),
        ("a.tar::{999999999..0}.tar", "1,000,000,001 names"),
        ("{0..99999999999999999999999999}.tar", "18 digits"),
        ("{0..1}" * 31, "30"),
    ],
)
def test_a_pattern_of_too_many_names_is_refused_before_the_first_is_looked_for(monkeypatch, pattern, said):
    monkeypatch.setattr("vlm_train.data.patterns._kind_of", None)
    with pytest.raises(DataError) as caught:
        expand_shards(pattern)
    assert said in str(caught.value) and caught.value.remedy and "hush" not in str(caught.value)


def test_nobody_waits_for_a_million_missing_shards(shards, monkeypatch):
    looked = []
    monkeypatch.setattr("vlm_train.data.patterns._kind_of", looked.append)
    with pytest.raises(DataError, match="10000 or more shards are missing") as caught:
        expand_shards(f"{shards}/none-{{000000..999999}}.tar")
    assert len(looked) == 10_000 and caught.value.got.endswith("none-000009.tar and 9990 more")


def test_a_range_counts_down_from_the_larger_number(shards):
    assert names(f"{shards}/a/{{002..000}}.tar", shards) == ["a/002.tar", "a/001.tar", "a/000.tar"]
    with pytest.raises(DataError, match="3 shards are missing") as caught:  # not dropped beside what is there
        expand_shards(f"{shards}/b{{3..1}}::{shards}/b")
    assert [name[-2:] for name in caught.value.got.split(", ")] == ["b3", "b2", "b1"]
    assert names(f"{shards}/a/{{000..002..2}}.tar", shards) == ["a/000.tar", "a/002.tar"]


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


@pytest.mark.parametrize(
    "name",
    [
        "s3://",
        "gs:///key.tar",
        "https://",
        "https:///x.tar",
        "https://[bad/x.tar",
        "http://u:hush@[::1/x.tar?s=hush",
        "https://h:99999/x.tar",
        "https://h:port/x.tar",
        "https://u:hush/hush@h/x.tar",
        "https://u:hush#hush@h/x.tar",
    ],
)
def test_a_url_that_leads_nowhere_is_refused(name):
    with pytest.raises(DataError, match="leads nowhere") as caught:
        expand_shards(["https://h/0.tar", name])
    assert caught.value.remedy and "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["/dev/null", "pipe"])
def test_what_cannot_be_read_again_is_no_shard(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        expand_shards(name)


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 300, "~", "::"])
def test_what_names_no_file_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match="missing") as caught:
        expand_shards(name)
    assert caught.value.got
