import tarfile

import pytest
import webdataset
from data_fixtures import members_of, write_dataset, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.formats.base import ShardIndex
from vlm_train.data.formats.tar import TarFormat, samples, unusable
from vlm_train.data.storage import open_file
from vlm_train.data.tar import TarFormatError, read_parts, split_name
from vlm_train.errors import DataError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def found_in(path):
    """(samples that the headers show, in order, without those that headers convict; the errors; what was ignored)."""
    index, seen, good = ShardIndex(path.name), set(), []
    file = open_file(str(path))
    for sample in samples(file, file.stat().size, index):
        reason = unusable(sample, seen)
        seen.add(sample.key)
        if reason:
            index.leave_out(sample.key, reason)
        else:
            good.append(sample)
    return good, index.errors, dict(index.ignored)


def read_all(path):
    content = path.read_bytes()
    return {s.key: read_parts(content[s.offset : s.offset + s.length])[1] for s in found_in(path)[0]}


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
    content, (good, errors, ignored) = path.read_bytes(), found_in(path)
    assert [sample.key for sample in good] == names
    assert not errors and not ignored
    found = {f"{s.key}.{name}": content[start : start + size] for s in good for name, start, size in s.parts}
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
    good, _, ignored = found_in(path)
    assert [[name for name, _, _ in sample.parts] for sample in good] == [["jpg", "txt"]]
    assert ignored == {"link": 1, "directory": 1, "pickle": 1, "unnamed": 1}
    assert list(read_all(path)["a"]) == ["jpg", "txt"]


def reasons(path):
    return [(error["key"], error["reason"]) for error in found_in(path)[1]]


def keys(path):
    return [sample.key for sample in found_in(path)[0]]


def test_a_duplicate_key_keeps_the_first_sample(tmp_path):
    members = [*members_of("a", 0), *members_of("b", 1), *members_of("a", 2), *members_of("b", 3)]
    path = write_tar(tmp_path / "a.tar", members)
    assert keys(path) == ["a", "b"]
    assert reasons(path) == [("a", "duplicate_key"), ("b", "duplicate_key")]
    twice = write_tar(tmp_path / "b.tar", [*members_of("a", 0), *members_of("a", 1)])
    assert keys(twice) == ["a"] and reasons(twice) == [("a", "duplicate_key")]


def test_a_member_without_bytes_leaves_its_sample_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*members_of("a", 0), *members_of("b", 1, caption=b"")])
    assert keys(path) == ["a"] and reasons(path) == [("b", "empty_member")]


def test_a_truncated_tar_keeps_the_whole_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in members_of(f"k{i}", i)])
    third = found_in(path)[0][2]
    content = path.read_bytes()
    for cut in (third.offset + 700, third.offset + third.length - 1, third.offset + 100):
        path.write_bytes(content[:cut])
        assert keys(path) == (["k0", "k1"] if cut > third.offset + 512 else ["k0"])
        assert [reason for _, reason in reasons(path)] == ["truncated"]
    path.write_bytes(content[: third.offset])
    assert keys(path) == ["k0"] and reasons(path) == [("k1", "no_end_marker")]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_costs_the_sample_that_it_lies_in(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", [m for i in range(5) for m in members_of(f"k{i}", i)], kind=kind)
    content, third = path.read_bytes(), found_in(path)[0][2]
    for name in ("jpg", "txt", "json"):
        start = next(offset for part, offset, _ in third.parts if part == name)
        damaged = bytearray(content)
        damaged[start - 512 + 5] ^= 1
        path.write_bytes(damaged)
        assert ("k2", "bad_header") in reasons(path)
        index = TarFormat().index(open_file(str(path)))
        kept = set(index.table()["key"].to_pylist())
        assert {"k0", "k4"} <= kept <= {"k0", "k1", "k3", "k4"}  # its neighbours go where they may have been cut too
        named = kept | {error["key"] for error in index.errors}
        assert named == {f"k{i}" for i in range(5)}  # nothing is lost without a word


def test_a_compressed_tar_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(DataError, match="compressed") as caught:
        TarFormat().index(open_file(str(path)))
    assert "gzip -d" in caught.value.remedy and "data.streaming=true" in caught.value.remedy


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("flip", range(0, 512, 37))
def test_any_changed_byte_of_a_header_is_noticed(tmp_path, kind, flip):
    """The checksum is compared modulo 65,521: it must still see what a sum sees."""
    path = write_tar(tmp_path / "a.tar", members_of("a", 0), kind=kind)
    chunk = bytearray(path.read_bytes())
    chunk[flip] ^= 0x41
    with pytest.raises(TarFormatError):
        read_parts(bytes(chunk))


def test_the_bytes_of_two_samples_are_not_one(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*members_of("a", 0), *members_of("b", 1)])
    first, second = found_in(path)[0]
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
