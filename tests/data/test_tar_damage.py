"""Tars with lies, holes and joints: every walk ends, indexing and streaming see the same, and nothing goes unsaid."""

import itertools
import time
import tracemalloc

import pytest
from hostile import TAR_END, padded, pax_header, pax_record, tar_header, tar_member, tar_sample
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_train.data import tar
from vlm_train.data.formats import tar as formats
from vlm_train.data.formats.base import ShardIndex
from vlm_train.data.formats.tar import samples, unusable
from vlm_train.data.tape import Tape
from vlm_train.data.tar_headers import TarFormatError, is_header, records, size_in

V7 = bytes(8)
SIZES = [b"-0000001000\0", b"+0000001000\0", b"0o000000017\0", b"00000001_00\0", b"\xff" * 12, b"\xff" + b"\0" * 11,
         b"\xc0" + bytes(11), b"\x80" + b"\x7f" * 11, b"\x80" + bytes(3) + b"\x80" + bytes(7)]  # fmt: skip
PAX_SIZES = [b"-1", b"-512", b"-1024", b"-1536", b"-0", b"+5", b"1_0", b" 5", b"5 ", b"0x5", b"1.5", b"9" * 40,
             b"9" * 5000, b"%d" % (1 << 63), "५".encode()]  # fmt: skip


def pieces(content, length):
    return (content[start : start + length] for start in range(0, len(content), length))


class InMemory:
    def __init__(self, content):
        self.content = content

    def read(self, offset, length):
        return self.content[offset : offset + length]


def gathered(readable, end):
    """(contents by key in order, (key, reason) of what was left out, what was ignored)"""
    index = ShardIndex("a.tar")
    found = [(sample.key, sample.contents) for sample in samples(readable, end, index)]
    return found, [(error["key"], error["reason"]) for error in index.errors], dict(index.ignored)


def seen(content, piece=700):
    """What indexing sees, after a look that streaming sees it too."""
    indexed = gathered(InMemory(content), len(content))
    assert gathered(Tape(pieces(content, piece)), None) == indexed
    return indexed


def keys(content):
    return [key for key, _ in seen(content)[0]]


def samples_of(numbers, **header):
    return b"".join(tar_sample(b"k%02d" % number, number, **header) for number in numbers)


def events(content, most):
    """All that a walk over an archive finds, by at most so many reads at ascending offsets."""
    asked = [0]

    def read(offset, length):
        assert offset >= asked[-1] and length > 0
        asked.append(offset)
        assert len(asked) <= most, "the walk does not end"
        return content[offset : offset + length]

    return list(tar.walk(read, len(content), whole=True))


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", SIZES)
def test_a_size_that_is_no_count_of_bytes_is_a_bad_header(field):
    lie = tar_header(b"lie.jpg", size_field=field)
    with pytest.raises(TarFormatError, match="bad_header"):
        size_in(lie, 0)
    found, errors, _ = seen(samples_of([0, 1]) + lie + samples_of([2, 3]) + TAR_END)
    assert [key for key, _ in found] == ["k00", "k03"] and errors == [("k01", "bad_header"), ("k02", "bad_header")]


@pytest.mark.parametrize("value", PAX_SIZES)
def test_so_is_a_size_in_a_pax_record(value):
    lie = pax_header(pax_record(b"size", value)) + tar_member(b"lie.jpg", bytes(600))
    with pytest.raises(TarFormatError, match="bad_header"):
        records(pax_record(b"size", value))
    found, errors, _ = seen(samples_of([0, 1]) + lie + samples_of([2, 3]) + TAR_END)
    assert [key for key, _ in found] == ["k00", "k02", "k03"]
    assert errors == [("k01", "bad_header"), ("lie", "bad_header")]


def test_sizes_that_are_good_are_read():
    octal = [
        (b"00000000007\0", 7),
        (b"         7 \0", 7),
        (b"000000000007", 7),
        (bytes(12), 0),
        (b"\x80" + bytes(10) + b"\7", 7),
    ]
    for field, size in octal:
        assert size_in(tar_header(b"a", size_field=field), 0) == size
    content = (
        pax_header(pax_record(b"size", b"600") + pax_record(b"path", b"b.txt"))
        + tar_header(b"a.jpg")
        + padded(b"x" * 600)
    )
    assert seen(content + TAR_END) == ([("b", {"txt": b"x" * 600})], [], {})
    assert records(pax_record(b"size", b"")) == {}  # the size of the header counts


@pytest.mark.parametrize(
    "after", [b"3 a\n", b"0 a=b\n", b"-6 a=b\n", b"6 a=bc", b"99 a=b\n", b"7", b"6a=bc\n", b"\n", b"\0x"]
)
def test_pax_records_are_read_whole_or_not_at_all(after):
    good = pax_record(b"path", b"a/b") + pax_record(b"mtime", b"1.5")
    assert records(good) == records(good + bytes(9)) == {"path": "a/b"} and records(b"") == {}
    with pytest.raises(TarFormatError, match="bad_header"):
        records(good + after)


def test_pax_records_take_time_in_proportion():
    def seconds(num):
        start = time.process_time()
        records(b"5 a=\n" * num)
        return time.process_time() - start

    short, long = (min(seconds(num) for _ in range(3)) for num in (13_000, 208_000))
    assert long < 64 * short  # 16 in proportion, 256 in its square


def test_signed_checksums_of_old_writers_hold():
    content = tar_member("é.jpg".encode(), b"x", signed=True, magic=V7) + tar_member(
        "é.txt".encode(), b"y", signed=True
    )
    assert seen(content + TAR_END) == ([("é", {"jpg": b"x", "txt": b"y"})], [], {})


def test_a_link_has_no_content_whatever_a_record_says():
    link = pax_header(pax_record(b"size", b"1024")) + tar_header(b"l.jpg", kind=b"2")
    assert seen(samples_of([0]) + link + samples_of([1]) + TAR_END)[1:] == ([], {"link": 1})
    assert keys(samples_of([0]) + link + samples_of([1]) + TAR_END) == ["k00", "k01"]


def test_the_map_of_an_old_sparse_file_is_passed_over():
    blocks = [bytearray(512), bytearray(512)]
    blocks[0][504] = 1
    sparse = (
        tar_header(b"s.jpg", 700, kind=b"S", magic=b"ustar  \0", flags=[(482, 1)])
        + b"".join(blocks)
        + padded(b"x" * 700)
    )
    found, errors, ignored = seen(samples_of([0]) + sparse + samples_of([1]) + TAR_END)
    assert [key for key, _ in found] == ["k00", "k01"] and not errors and ignored == {"sparse": 1}


# --- the walk --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([b"a.txt", b"a.jpg", b"b.txt", b"dir/c.json", b"README", b"d/"])
CONTENTS = st.binary(max_size=1300)
FRAGMENTS = st.one_of(
    st.builds(tar_member, NAMES, CONTENTS, magic=st.sampled_from([V7, b"ustar\x0000", b"ustar  \0"])),
    st.builds(
        tar_header,
        NAMES,
        kind=st.binary(min_size=1, max_size=1),
        size_field=st.one_of(st.sampled_from(SIZES), st.binary(min_size=12, max_size=12), st.just(b"00000002000\0")),
        flags=st.just([(482, 1)]),
    ),
    st.builds(pax_header, st.one_of(CONTENTS, st.sampled_from(PAX_SIZES).map(lambda size: pax_record(b"size", size)))),
    st.integers(0, 3000).map(lambda size: pax_header(pax_record(b"size", b"%d" % size))),
    st.builds(tar_member, st.just(b"././@LongLink"), CONTENTS, kind=st.sampled_from([b"L", b"K", b"g", b"X"])),
    st.integers(1, 3).map(lambda num: bytes(512 * num)),
    CONTENTS.map(padded),
    CONTENTS,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(fragments=st.lists(FRAGMENTS, max_size=8), is_finished=st.booleans(), piece=st.integers(1, 3000))
@example(fragments=[pax_header(pax_record(b"size", b"-1536")), tar_member(b"a.jpg", b"x")], is_finished=True, piece=99)
@example(fragments=[tar_member(b"a.jpg", b"x"), b"Z" * 512, bytes(3)], is_finished=False, piece=512)
def test_every_walk_goes_forward_ends_and_is_the_same_for_a_stream(fragments, is_finished, piece):
    content = b"".join(fragments) + (TAR_END if is_finished else b"")
    found = events(content, 6 * (len(content) // 512 + 2))
    members = [event for event in found if isinstance(event, tar.Member)]
    for before, after in itertools.pairwise(members):
        assert before.offset < before.data_offset <= before.data_offset + before.size <= after.offset
    assert len(found) <= 2 * (len(content) // 512 + 1)
    seen(content, piece)


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(st.sampled_from(["good", "v7", "broken", "hole", "zeroed", "junk", "end"]), max_size=12),
    end=st.booleans(),
)
@example(items=["good", "hole", "good", "good"], end=True)
@example(items=["good", "end", "good", "good"], end=True)
@example(items=["v7", "v7", "broken", "v7", "v7"], end=True)
def test_nothing_is_lost_without_a_word(items, end):
    """Every sample that is there whole is found or named, and every one that is not there whole leaves a word."""
    number, content = itertools.count(), b""
    for item in items:
        name = b"k%02d.txt" % next(number)
        member = tar_member(name, b"caption", magic=V7 if item == "v7" else b"ustar\x0000")
        made = {
            "broken": b"?" + member[1:],
            "hole": bytes(512),
            "zeroed": bytes(512) + member[512:],
            "junk": b"Z" * 700,
            "end": TAR_END,
        }
        content += padded(made.get(item, member))
    found, errors, ignored = seen(content + (TAR_END if end else b""))
    good = {f"k{place:02d}" for place, item in enumerate(items) if item in ("good", "v7")}
    told = [key for key, _ in found]
    assert len(told) == len(set(told)) and set(told) <= good
    assert good - set(told) <= {key for key, _ in errors}
    if {"broken", "zeroed"} & set(items):
        assert errors or ignored.get("garbage")


def test_twin_a_walk_that_ends_at_the_first_zeros_loses_without_a_word(monkeypatch):
    content = samples_of([0, 1]) + bytes(512) + samples_of([2, 3]) + TAR_END

    def stop(archive):
        archive.over = True

    monkeypatch.setattr(tar._Archive, "after_zeros", stop)
    assert seen(content) == (seen(samples_of([0, 1]) + TAR_END)[0], [], {})


@pytest.mark.parametrize("magic", [V7, b"ustar\x0000", b"ustar  \0"])
def test_one_damaged_header_costs_no_more_in_any_dialect(magic):
    content = samples_of([0, 1], magic=magic) + b"Z" * 512 + samples_of(range(2, 20), magic=magic) + TAR_END
    assert keys(content) == ["k00", *(f"k{number:02d}" for number in range(3, 20))]
    broken = bytearray(samples_of(range(9), magic=magic) + TAR_END)
    place = broken.index(b"k04.txt")
    broken[place] ^= 1
    assert keys(bytes(broken)) == [f"k{number:02d}" for number in (0, 1, 2, 3, 6, 7, 8)]


def test_a_tar_inside_a_tar_is_content():
    inner = tar_member(b"inner.tar", samples_of([7, 8]) + TAR_END)
    for damage in (b"Z" * 512, bytes(512), b"Z" * 100_000):
        content = samples_of([0, 1]) + padded(damage) + inner + samples_of([2, 3]) + TAR_END
        assert keys(content) == ["k00", "k02", "k03"]


def test_text_does_not_pass_for_a_header_even_if_its_checksum_holds():
    block = bytearray(b"7" * 512)
    block[148:156] = b" " * 8
    block[148:156] = b"%08o" % sum(block)
    assert size_in(bytes(block), 0) == 0o777777777777  # so it takes more than a checksum
    assert not is_header(bytes(block))
    named = tar_header(b"a.jpg", 5)
    assert is_header(named) and not is_header(bytes(512)) and not is_header(tar_header(b"a.jpg", 5, kind=b"~"))
    assert not is_header(tar_header(b"", 5))


# --- the end ---------------------------------------------------------------------------------------------------------


def test_tars_that_were_joined_are_all_read():
    one, two = samples_of([0, 1]) + TAR_END + bytes(8192), samples_of([2, 3], magic=V7) + TAR_END
    found, errors, ignored = seen(one + two + samples_of([4]) + TAR_END)
    assert [key for key, _ in found] == ["k00", "k01", "k02", "k03", "k04"]
    assert not errors and ignored == {"end_marker": 2}


def test_a_sample_does_not_go_on_behind_an_end():
    halves = tar_member(b"a.jpg", b"x") + TAR_END, tar_member(b"a.txt", b"y") + TAR_END
    assert seen(b"".join(halves)) == ([("a", {"jpg": b"x"}), ("a", {"txt": b"y"})], [], {"end_marker": 1})


def test_an_end_makes_sure_what_damage_before_it_made_doubtful():
    content = samples_of([0, 1]) + b"Z" * 512 + TAR_END + samples_of([2]) + TAR_END
    found, errors, _ = seen(content)
    assert errors[0] == ("k01", "bad_header") and {key for key, _ in found} | {key for key, _ in errors} == {
        "k00",
        "k01",
        "k02",
    }


@pytest.mark.parametrize("garbage", [b"x", b"Z" * 5000, b"\0" * 511 + b"x"])
def test_what_follows_the_end_and_is_no_tar_is_counted(garbage):
    found, errors, ignored = seen(samples_of([0, 1]) + TAR_END + garbage)
    assert [key for key, _ in found] == ["k00", "k01"] and not errors and ignored == {"garbage": 1}


def test_garbage_before_headers_is_damage():
    found, errors, ignored = seen(samples_of([0, 1]) + TAR_END + b"Z" * 512 + samples_of([2, 3]) + TAR_END)
    assert [key for key, _ in found] == ["k00", "k03"] and not ignored
    assert errors == [("k01", "bad_header"), ("k02", "bad_header")]


@pytest.mark.parametrize("num_bytes", [512, 700, 1024, 10_240, 64 << 20])
def test_zeros_to_the_end_are_an_end_and_quickly_read(num_bytes):
    content = samples_of([0, 1]) + bytes(num_bytes)
    assert keys(content) == ["k00", "k01"]
    found = events(content, 20 + (num_bytes >> 20))
    assert [event.name for event in found] == ["k00.jpg", "k00.txt", "k01.jpg", "k01.txt"]


def test_a_long_name_without_a_member_is_damage():
    content = samples_of([0, 1]) + tar_member(b"././@LongLink", b"x" * 200, kind=b"L") + TAR_END
    found, errors, _ = seen(content)
    assert [key for key, _ in found] == ["k00"] and errors == [("k01", "bad_header")]


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
@pytest.mark.parametrize("num_there", [0, 1, 299])
def test_a_tar_that_breaks_off_in_what_stands_before_a_member_is_truncated(kind, num_there):
    before = tar_header(b"././@LongLink", 300, kind=kind) + b"x" * num_there
    found, errors, _ = seen(samples_of([0, 1]) + before)
    assert [key for key, _ in found] == ["k00"] and errors == [("k01", "truncated")]


def test_zeros_inside_the_bytes_of_a_sample_are_no_end():
    whole = tar_member(b"a.jpg", b"x") + tar_member(b"a.txt", b"y")
    assert tar.read_parts(whole) == ("a", {"jpg": b"x", "txt": b"y"})
    for hole in (bytes(512), bytes(1024)):
        with pytest.raises(TarFormatError, match="bad_header"):
            tar.read_parts(whole + hole + tar_member(b"a.json", b"{}"))
        with pytest.raises(TarFormatError, match="bad_header"):
            tar.read_parts(whole + hole)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_stream_keeps_no_more_than_a_sample(monkeypatch):
    """Members of no sample, and samples that are too large, pass by; so does a member that says it never ends."""
    monkeypatch.setattr(formats, "_MAX_LENGTH", 1 << 20)
    large, num = 96 << 20, 3

    def stream():
        for name in (b"README", b"large.jpg"):
            yield tar_header(name, large)
            yield from itertools.repeat(bytes(1 << 20), large >> 20)
        yield samples_of(range(num))
        yield tar_header(b"endless.jpg", 1 << 32)
        yield from itertools.repeat(b"x" * (1 << 20), 40)

    index = ShardIndex("a.tar")
    tracemalloc.start()
    found = list(samples(Tape(stream()), None, index))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [unusable(sample, set()) for sample in found] == ["sample_too_large", None, None, None]
    assert [error["reason"] for error in index.errors] == ["truncated"]
    assert peak < 24 << 20
