import tarfile

import pytest
import webdataset
from data_fixtures import members_of, write_dataset, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.tar import TarFormatError, index_tar, read_parts, split_name
from vlm_train.errors import DataError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def read_all(path):
    content = path.read_bytes()
    return {s.key: read_parts(content[s.offset : s.offset + s.length])[1] for s in index_tar(path).samples}


def test_key_ends_at_the_first_dot_of_the_base_name():
    assert split_name("a.b/c.d.JPG") == ("a.b/c", "d.jpg")
    assert split_name("./x/0001.0.jpg") == ("./x/0001", "0.jpg")
    assert split_name("noextension") is None
    assert split_name("dir/.hidden.jpg") is None


@pytest.mark.parametrize("kind", FORMATS)
def test_offsets_point_at_the_content_in_every_tar_format(tmp_path, kind):
    directory = "d" * 90 + "/" + "e" * 60  # longer than the 100 bytes of a name field
    names = [f"{directory}/ключ{i}" if kind != tarfile.USTAR_FORMAT else f"{directory}/k{i}" for i in range(3)]
    members = [(f"{name}.{part}", f"{name} {part}".encode() * 50) for name in names for part in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members, kind=kind)
    content, index = path.read_bytes(), index_tar(path)
    assert [sample.key for sample in index.samples] == names
    assert not index.errors and not index.num_ignored
    found = {f"{s.key}.{p.name}": content[p.offset : p.offset + p.size] for s in index.samples for p in s.parts}
    assert found == dict(members)
    assert read_all(path) == {name: {p: dict(members)[f"{name}.{p}"] for p in ("jpg", "txt")} for name in names}


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    keys=st.lists(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=150), unique=True, min_size=1),
    contents=st.lists(st.binary(min_size=1, max_size=1200), min_size=1, max_size=3),
)
def test_any_tar_that_tarfile_writes_is_read_back(tmp_path_factory, kind, keys, contents):
    members = [(f"{key}.{number}.bin", content) for key in keys for number, content in enumerate(contents)]
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    try:
        write_tar(path, members, kind=kind)
    except ValueError:  # ustar cannot spell every name
        return
    wanted = {key: {f"{number}.bin": content for number, content in enumerate(contents)} for key in keys}
    assert read_all(path) == wanted


def test_the_webdataset_library_sees_the_same_samples(tmp_path):
    folder = write_dataset(tmp_path, (5, 3))
    for path in sorted(folder.glob("*.tar")):
        dataset = webdataset.WebDataset(str(path), shardshuffle=False)
        theirs = {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in dataset}
        assert theirs and read_all(path) == theirs


def test_links_directories_and_pickles_are_ignored_and_counted(tmp_path):
    link, folder = tarfile.TarInfo("a.png"), tarfile.TarInfo("b.jpg")
    link.type, link.linkname, folder.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.DIRTYPE
    jpg, txt, _ = members_of("a", 0)
    path = write_tar(tmp_path / "a.tar", [jpg, link, txt, folder, ("a.pkl", b"x"), ("README", b"x")])
    index = index_tar(path)
    assert [[part.name for part in sample.parts] for sample in index.samples] == [["jpg", "txt"]]
    assert index.num_ignored == 4
    assert list(read_all(path)["a"]) == ["jpg", "txt"]


def test_a_duplicate_key_keeps_the_first_sample(tmp_path):
    members = [*members_of("a", 0), *members_of("b", 1), *members_of("a", 2), *members_of("b", 3)]
    index = index_tar(write_tar(tmp_path / "a.tar", members))
    assert [sample.key for sample in index.samples] == ["a", "b"]
    assert [(error["key"], error["reason"]) for error in index.errors] == [
        ("a", "duplicate_key"),
        ("b", "duplicate_key"),
    ]
    twice = index_tar(write_tar(tmp_path / "b.tar", [*members_of("a", 0), *members_of("a", 1)]))
    assert len(twice.samples) == 1 and twice.errors[0]["reason"] == "duplicate_key"


def test_a_member_without_bytes_leaves_its_sample_out(tmp_path):
    index = index_tar(write_tar(tmp_path / "a.tar", [*members_of("a", 0), *members_of("b", 1, caption=b"")]))
    assert [sample.key for sample in index.samples] == ["a"]
    assert index.errors == [{"shard": "a.tar", "key": "b", "reason": "empty_member"}]


def test_a_truncated_tar_keeps_the_whole_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in members_of(f"k{i}", i)])
    third = index_tar(path).samples[2]
    content = path.read_bytes()
    for cut in (third.offset + 700, third.offset + third.length - 1, third.offset + 100):
        path.write_bytes(content[:cut])
        index = index_tar(path)
        assert [s.key for s in index.samples] == (["k0", "k1"] if cut > third.offset + 512 else ["k0"])
        assert [error["reason"] for error in index.errors] == ["truncated"]
    path.write_bytes(content[: third.offset])
    assert [error["reason"] for error in index_tar(path).errors] == ["no_end_marker"]


def test_a_damaged_header_stops_the_walk_and_says_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in members_of(f"k{i}", i)])
    content = bytearray(path.read_bytes())
    content[index_tar(path).samples[2].offset + 5] ^= 1
    path.write_bytes(content)
    index = index_tar(path)
    assert [s.key for s in index.samples] == ["k0"] and index.errors[0]["reason"] == "bad_header"


@pytest.mark.parametrize("members", [[], [("README", b"x")], [("a.jpg", b"")]])
def test_a_tar_with_nothing_usable_is_named(tmp_path, members):
    path = write_tar(tmp_path / "empty.tar", members)
    with pytest.raises(DataError, match=r"empty\.tar") as caught:
        index_tar(path)
    assert caught.value.remedy


def test_a_compressed_tar_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(DataError, match="compressed") as caught:
        index_tar(path)
    assert "gzip -d" in caught.value.remedy


def test_the_bytes_of_two_samples_are_not_one(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*members_of("a", 0), *members_of("b", 1)])
    first, second = index_tar(path).samples
    content = path.read_bytes()
    with pytest.raises(TarFormatError, match="does not belong"):
        read_parts(content[first.offset : second.offset + second.length])
    with pytest.raises(TarFormatError):
        read_parts(content[first.offset + 7 : first.offset + first.length])
    with pytest.raises(TarFormatError):
        read_parts(b"")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_error_or_parts_but_nothing_else(tmp_path_factory, data):
    path = write_tar(tmp_path_factory.mktemp("t") / "a.tar", members_of("a", 0), kind=tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 1600))] = data.draw(st.integers(0, 255))
    try:
        _, parts = read_parts(bytes(content))
    except TarFormatError as error:
        assert error.reason in ("truncated", "bad_header")
    else:
        assert all(isinstance(part, bytes) for part in parts.values())
