"""`.beton` files without ffcv: what goes in comes out, and nothing that a file claims can hurt."""

import contextlib
import io
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from data_fixtures import encoded, members_of, pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_train.data import beton, beton_sample, decode
from vlm_train.data.beton import ALLOCATION, FIELD, HEADER, BetonWriter
from vlm_train.data.decode import SampleError
from vlm_train.data.formats.beton import BetonFormat
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.storage import LocalFile
from vlm_train.errors import DataError

FLOAT, INT, RGB, BYTES, NDARRAY, JSON, TENSOR, CUSTOM = 0, 1, 2, 3, 4, 5, 6, 255
MANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
HARD = settings(MANY, max_examples=300)


def parts_of(seed, **options):
    return {name.split(".", 1)[1]: content for name, content in members_of(f"k{seed}", seed, **options)}


def write(path, samples, **options):
    path.unlink(missing_ok=True)
    with BetonWriter(path, len(samples), **options) as writer:
        for key, parts in samples:
            writer.write(key, parts)
    return LocalFile(str(path))


def read(file):
    """(index, samples) of a whole file."""
    index = BetonFormat().index(file)
    return index, BetonFormat().read(file, index.entries())


def come_back(samples, found):
    """Whether keys, bytes of every part and uids are what they were."""
    return len(samples) == len(found) and all(
        key == other_key and parts == others and decode.sample_uid(parts) == decode.sample_uid(others)
        for (key, parts), (other_key, others) in zip(samples, found, strict=True)
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
META = st.dictionaries(TEXT, TEXT | st.integers() | st.none() | st.lists(TEXT, max_size=2), max_size=3)


@st.composite
def samples_of(draw):
    found = []
    for seed in range(draw(st.integers(1, 4))):
        parts = {draw(st.sampled_from(["jpg", "jpeg", "0.jpg"])): encoded(pixels(seed, 24 + seed, 20))}
        parts["txt"] = f"a{draw(TEXT)}".encode()
        if draw(st.booleans()):
            separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,", "  :")]))
            facts = {"caption": "b", **draw(META)}
            parts["json"] = json.dumps(facts, separators=separators, ensure_ascii=draw(st.booleans())).encode()
            if draw(st.booleans()):
                del parts["txt"]
        if draw(st.booleans()):
            parts[draw(st.sampled_from(["cls", "key", "image", "other"]))] = draw(TEXT).encode()
        found.append((f"{seed}{draw(TEXT)}", parts))
    return found


@MANY
@given(samples=samples_of())
def test_keys_texts_and_jpegs_come_back_byte_for_byte(tmp_path, samples):
    index, found = read(write(tmp_path / "a.beton", samples))
    assert come_back(samples, found)
    assert not index.errors
    key, parts = found[0]  # the twins: another text, another image, another key
    image = decode.image_parts(parts)[0]
    assert not come_back(samples, [(key, {**parts, "txt": b"?"}), *found[1:]])
    assert not come_back(samples, [(key, {**parts, image: encoded(pixels(99))}), *found[1:]])
    assert not come_back(samples, [(key + "x", parts), *found[1:]])


@MANY
@given(keys=st.lists(st.sampled_from(["a", "b", "c", "é"]), min_size=1, max_size=7))
def test_of_samples_of_one_key_the_first_stays(tmp_path, keys):
    index, found = read(write(tmp_path / "a.beton", [(key, parts_of(seed)) for seed, key in enumerate(keys)]))
    first = {key: parts_of(seed) for seed, key in reversed(list(enumerate(keys)))}
    assert dict(found) == first and len(found) == len(first) == index.num_samples
    twice = [key for number, key in enumerate(keys) if key in keys[:number]]
    assert [(error["key"], error["reason"]) for error in index.errors] == [(key, "duplicate_key") for key in twice]


def test_a_manifest_row_has_what_a_tar_gives(tmp_path):
    samples = [(f"k{seed}", parts_of(seed)) for seed in range(3)]
    file = write(tmp_path / "a.beton", samples)
    index, _ = read(file)
    for number, (row, (key, parts)) in enumerate(zip(index.table().to_pylist(), samples, strict=True)):
        assert (row["shard"], row["key"], row["number"], row["label"]) == ("a.beton", key, number, number % 3)
        assert (row["uid"], row["width"], row["height"]) == (decode.sample_uid(parts), 24, 20)
        assert file.read(row["offset"], row["length"]) == parts["jpg"]
        names = {part["name"]: file.read(part["offset"], part["size"]) for part in row["parts"]}
        assert names["jpg"] == parts["jpg"]
        assert set(names) == set(parts)
        assert json.loads(names["txt"].rstrip(b"\0"))["txt"] == parts["txt"].decode()
    assert index.entries()["uid"].tolist() == [decode.sample_uid(parts) for _, parts in samples]


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels(1), exif=exif)


def four_colours():
    buffer = io.BytesIO()
    Image.fromarray(pixels(1)).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "image", "mode"),
    [
        ("jpg", encoded(pixels(1)), beton.JPEG),
        ("jpg", encoded(pixels(1), progressive=True), beton.JPEG),
        ("jpg", encoded(pixels(1)[..., 0]), beton.JPEG),
        ("jpg", rotated(), beton.RAW),
        ("jpg", four_colours(), beton.RAW),
        ("png", encoded(np.dstack([pixels(1), pixels(2)[..., :1]]), "PNG"), beton.RAW),
        ("gif", encoded(pixels(1), "GIF"), beton.RAW),
        ("webp", encoded(pixels(1), "WEBP", lossless=True), beton.RAW),
        ("ppm", b"P6\n24 20\n255\n" + pixels(1).tobytes(), beton.RAW),
    ],
)
def test_what_ffcv_cannot_decode_is_stored_as_the_displayed_pixels(tmp_path, name, image, mode):
    assert beton.stored_image(image)[0] == mode
    index, [(_, parts)] = read(write(tmp_path / "a.beton", [("k", {name: image, "txt": b"a"})]))
    shown = decode.open_image(image)
    found = decode.open_image(decode.first_image(parts))
    assert (found.width, found.height, found.orientation) == (shown.width, shown.height, 1)
    assert np.array_equal(found.decode(), shown.decode())
    assert index.table()["width"].to_pylist() == [shown.width]
    assert (mode == beton.JPEG or name == "ppm") == (
        decode.sample_uid(parts) == decode.sample_uid({name: image, "txt": b"a"})
    )


def pages_of(path):
    """(page size, {sample: pages it touches})."""
    content = path.read_bytes()
    header = np.frombuffer(content[:24], HEADER)[0]
    pages = {}
    for sample, pointer, size in np.frombuffer(content[int(header["table_start"]) :], ALLOCATION).tolist():
        first, last = pointer // int(header["page_size"]), (pointer + size - 1) // int(header["page_size"])
        pages.setdefault(sample, set()).update({first, last})
    return int(header["page_size"]), pages


@settings(MANY, max_examples=15)
@given(sides=st.lists(st.sampled_from([8, 300, 700, 837, 900, 1300]), min_size=1, max_size=8))
def test_a_sample_lies_in_one_page_and_pages_grow_with_it(tmp_path, sides):
    plain = [b"P6\n%d %d\n255\n" % (side, side) + bytes(3 * side * side) for side in sides]
    samples = [(f"{number}", {"ppm": image, "txt": b"a"}) for number, image in enumerate(plain)]
    file = write(tmp_path / "a.beton", samples, page_size=1 << 21)
    page_size, pages = pages_of(tmp_path / "a.beton")
    assert all(len(touched) == 1 for touched in pages.values())
    assert page_size == (1 << 21 if max(sides) < 837 else 1 << 22 if max(sides) < 1182 else 1 << 23)
    assert come_back(samples, read(file)[1])


def test_the_page_test_can_fail(tmp_path):
    path = tmp_path / "a.beton"
    image = b"P6\n800 800\n255\n" + bytes(3 * 800 * 800)
    write(path, [("0", {"ppm": image, "txt": b"a"})] * 3, page_size=1 << 21)
    content = bytearray(path.read_bytes())
    content[4:8] = (1 << 20).to_bytes(4, "little")
    path.write_bytes(content)
    assert any(len(touched) > 1 for touched in pages_of(path)[1].values())


def test_memory_of_the_writer_does_not_grow_with_the_images(tmp_path):
    image = b"P6\n1000 1000\n255\n" + bytes(3_000_000)
    with BetonWriter(tmp_path / "a.beton", 40) as writer:
        writer.write("0", {"ppm": image, "txt": b"a"})
        tracemalloc.start()
        for number in range(1, 40):
            writer.write(f"{number}", {"ppm": image, "txt": b"a"})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5 * len(image) < 40 * len(image)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "a.beton"
    with pytest.raises(KeyError), BetonWriter(path, 2) as writer:
        writer.write("a", parts_of(1))
        raise KeyError
    with pytest.raises(DataError, match="no sample"), BetonWriter(path, 2):
        pass
    with pytest.raises(DataError, match="more samples"), BetonWriter(path, 1) as writer:
        writer.write("a", parts_of(1))
        writer.write("b", parts_of(2))
    assert not list(tmp_path.iterdir())


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "a.beton").write_bytes(b"mine")
    with pytest.raises(DataError, match="there already"):
        BetonWriter(tmp_path / "a.beton", 1)
    assert (tmp_path / "a.beton").read_bytes() == b"mine"
    with pytest.raises(DataError, match="page size"):
        BetonWriter(tmp_path / "b.beton", 1, page_size=3 << 21)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("several_images", {"1.jpg": encoded(pixels(2))}),
        ("part_not_text", {"npy": b"\x93NUMPY"}),
        ("part_not_text", {"txt": b"\xff"}),
        ("metadata_json", {"json": b"["}),
        ("image_unknown", {"jpg": b"none"}),
        ("image_corrupt", {"jpg": encoded(pixels(2), "PNG")[:-40]}),
        ("image_too_large", {"jpg": b"P6\n65536 1\n255\n" + bytes(3 * 65536)}),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_and_the_others_are_kept(tmp_path, reason, change):
    good = [("a", parts_of(1)), ("b", parts_of(2))]
    with BetonWriter(tmp_path / "a.beton", 3) as writer:
        writer.write(*good[0])
        with pytest.raises(SampleError) as caught:
            writer.write("bad", parts_of(3) | change)
        writer.write(*good[1])
    assert caught.value.reason == reason or (reason == "image_corrupt" and caught.value.reason == "image_truncated")
    assert writer.num_written == 2
    assert come_back(good, read(LocalFile(str(tmp_path / "a.beton")))[1])


# Files that somebody else wrote, put together here from the description of the format.


def foreign(path, fields, samples):
    """`fields`: (name, type). A sample is a list of values: int, float, (w, h, jpeg or pixels), or bytes."""
    content, rows, table = bytearray(24), [], []
    for name, kind in fields:
        content += bytes([kind]) + name.encode().ljust(16, b"\0")[:16] + bytes(1024)
    plain = {INT: "<q", FLOAT: "<d", NDARRAY: "<Q", TENSOR: "<Q"}
    size = sum({RGB: 13, BYTES: 16, JSON: 16}.get(kind, 8) for _, kind in fields)
    dtype = np.dtype(
        [
            (f"{number}", plain.get(kind) or ("V13" if kind == RGB else "V16"))
            for number, (_, kind) in enumerate(fields)
        ],
        align=True,
    )
    assert dtype.itemsize >= size
    start = len(content) + len(samples) * dtype.itemsize
    data = bytearray()
    for number, values in enumerate(samples):
        row = np.zeros((), dtype)
        for place, ((_, kind), value) in enumerate(zip(fields, values, strict=True)):
            if kind in (INT, FLOAT):
                row[f"{place}"] = value
                continue
            raw = value[2] if kind == RGB else value
            where = start + len(data)
            table.append((number, where, len(raw)))
            data += raw
            pointer = where.to_bytes(8, "little")
            if kind == RGB:
                width, height, _ = value
                mode = 0 if raw[:2] == b"\xff\xd8" else 1
                sides = width.to_bytes(2, "little") + height.to_bytes(2, "little")
                row[f"{place}"] = np.void(bytes([mode]) + sides + pointer)
            elif kind in (BYTES, JSON):
                row[f"{place}"] = np.void(pointer + len(raw).to_bytes(8, "little"))
            else:
                row[f"{place}"] = where
        rows.append(row)
    content += b"".join(row.tobytes() for row in rows) + data
    header = np.array([(2, len(fields), 1 << 23, len(samples), len(content))], HEADER)
    content[:24] = header.tobytes()
    path.write_bytes(content + np.array(table[::-1], ALLOCATION).tobytes())  # in any order
    return LocalFile(str(path))


JPG = (24, 20, encoded(pixels(1)))


@pytest.mark.parametrize("caption", [b"t\xc3\xa9l\xc3\xa9", b"{not json", b"padded\0\0\0", b'"quoted"', b"[1]", b"12"])
def test_a_bytes_field_is_the_caption(tmp_path, caption):
    file = foreign(tmp_path / "a.beton", [("image", RGB), ("whatever", BYTES)], [[JPG, caption]])
    assert read(file)[1] == [("00000000", {"jpg": JPG[2], "txt": caption.rstrip(b"\0")})]


@pytest.mark.parametrize("kind", [JSON, BYTES])
def test_an_object_is_the_metadata(tmp_path, kind):
    facts = {"key": "ключ", "captions": ["a", "b"], "label": 4}
    file = foreign(tmp_path / "a.beton", [("image", RGB), ("x", kind)], [[JPG, json.dumps(facts).encode() + b"\0"]])
    index, [(key, parts)] = read(file)
    assert (key, set(parts), json.loads(parts["json"])) == ("ключ", {"jpg", "json"}, facts)
    assert index.table()["label"].to_pylist() == [4]


@pytest.mark.parametrize("more", [{"other": {"n": 1}}, {"other": "x"}, {"txt": 1}, {"caption": "b"}])
def test_an_object_that_only_looks_like_ours_is_metadata(more):
    ours = {"key": "k", "image": "jpg", "txt": "a", "other": {"cls": "3"}}
    assert beton_sample.unpack(ours) == ("k", "jpg", {"txt": b"a", "cls": b"3"})
    assert beton_sample.unpack(ours | more) is None


def test_json_text_and_lists_are_captions(tmp_path):
    values = [b'"one"\0', b'["two", "three"]\0', b"7\0", b"{\0", b'"\\ud800"\0', b"[" * 100_000]
    file = foreign(tmp_path / "a.beton", [("image", RGB), ("x", JSON)], [[JPG, value] for value in values])
    index, found = read(file)
    assert [parts.get("txt") or json.loads(parts["json"]) for _, parts in found] == [
        b"one",
        {"captions": ["two", "three"]},
    ]
    assert [(error["key"], error["reason"]) for error in index.errors] == [
        ("00000002", "metadata_json"),
        ("00000003", "metadata_json"),
        ("00000004", "caption_utf8"),
        ("00000005", "metadata_json"),
    ]


def test_an_object_that_is_nested_ever_deeper_costs_its_sample_alone(tmp_path):
    """Somewhere between the reader's limit and the writer's."""
    values = [b'{"captions": ["a"], "x": ' + b"[" * depth + b"]" * depth + b"}" for depth in range(850, 1010)]
    file = foreign(tmp_path / "a.beton", [("image", RGB), ("x", JSON)], [[JPG, value] for value in values])
    index = BetonFormat().index(file)
    assert 0 < index.num_samples < len(values)
    assert {error["reason"] for error in index.errors} == {"metadata_json"}


@MANY
@given(data=st.data())
def test_fields_are_found_by_type_and_name_wherever_they_stand(tmp_path, data):
    fields = {
        "image": (RGB, JPG),
        "caption": (BYTES, b"hello"),
        "metadata": (JSON, b'{"source": "x", "label": "word"}\0'),
        "label": (INT, 5),
        "idx": (INT, 77),
        "score": (FLOAT, 0.5),
        "embedding": (NDARRAY, b"12345678"),
        "tensor": (TENSOR, b"1234"),
        "blob": (BYTES, b""),
    }
    names = data.draw(st.permutations(list(fields)).flatmap(lambda order: st.sets(st.sampled_from(order)).map(lambda some: [n for n in order if n in some | {"image", "caption"}])))  # fmt: skip  # noqa: E501
    file = foreign(tmp_path / "a.beton", [(n, fields[n][0]) for n in names], [[fields[n][1] for n in names]] * 2)
    index, found = read(file)
    facts = {"source": "x", "label": "word"} if "metadata" in names else {"label": 5} if "label" in names else None
    expected = {"jpg": JPG[2], "txt": b"hello"} | ({} if facts is None else {"json": json.dumps(facts).encode()})
    assert found == [("00000000", expected), ("00000001", expected)]
    assert not index.errors


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ([("image", RGB), ("img", RGB), ("caption", BYTES)], "`image`, `img`"),
        ([("a", RGB), ("b", RGB), ("caption", BYTES)], "`a` (type 2), `b` (type 2)"),
        ([("image", RGB), ("caption", BYTES), ("text", JSON)], "`caption`, `text`"),
        ([("image", RGB), ("a", BYTES), ("b", JSON)], "`a` (type 3), `b` (type 5)"),
        ([("image", RGB), ("json", JSON), ("meta", JSON)], "`json`, `meta`"),
        ([("image", RGB), ("text", BYTES), ("label", INT), ("class", INT)], "`label`, `class`"),
        ([("image", RGB), ("label", INT)], "`image` (type 2), `label` (type 1)"),
        ([("caption", BYTES)], "`caption` (type 3)"),
        ([("image", RGB), ("caption", BYTES), ("mask", CUSTOM)], "`mask`"),
        ([("image", RGB), ("caption", BYTES), ("next", 9)], "`next`"),
        ([], "no fields"),
    ],
)
def test_what_cannot_be_told_apart_is_listed(tmp_path, fields, named):
    with pytest.raises(DataError) as caught:
        BetonFormat().index(foreign(tmp_path / "a.beton", fields, []))
    assert named in str(caught.value)


# Files that lie.


@pytest.fixture
def whole(tmp_path):
    samples = [(f"k{seed}", parts_of(seed)) for seed in range(4)]
    samples[2][1].update(jpg=encoded(pixels(2), "PNG"))
    file = write(tmp_path / "a.beton", samples, page_size=1 << 21)
    return file, bytearray((tmp_path / "a.beton").read_bytes())


def lie(whole, offset, value, size=8):
    file, content = whole
    changed = bytearray(content)
    changed[offset : offset + size] = value.to_bytes(size, "little")
    with open(file.location, "wb") as stream:
        stream.write(changed)
    return file


ROWS = 24 + 3 * FIELD.itemsize
HUGE = [1 << 20, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("offset", [8, 16])
def test_absurd_counts_and_pointers_make_the_file_unusable(whole, offset, value):
    if offset == 16 and value == 1 << 20:
        value = 1 << 10  # inside the file, but before the rows end
    with pytest.raises(DataError, match="cannot be read as an FFCV file"):
        BetonFormat().index(lie(whole, offset, value))


@pytest.mark.parametrize(
    ("offset", "value", "size", "got"),
    [(0, 1, 2, "version 1"), (0, 3, 2, "version 3"), (2, 65535, 2, "65535 fields"), (16, 0, 8, "did not finish")],
)
def test_a_wrong_header_is_named(whole, offset, value, size, got):
    with pytest.raises(DataError, match=got):
        BetonFormat().index(lie(whole, offset, value, size))


@pytest.mark.parametrize(
    ("offset", "value", "size", "reason"),
    [
        *((5, value, 8, "bad_pointer") for value in [0, 7, *HUGE]),  # of the image
        *((13, value, 8, "bad_pointer") for value in HUGE[1:]),  # of the text
        *((21, value, 8, "bad_pointer") for value in HUGE[1:]),  # size of the text
        (0, 2, 1, "image_unknown"),
        (0, 1, 1, "image_truncated"),  # pixels, says the row; a JPEG has fewer bytes
        (21, 9, 8, "metadata_json"),
    ],
)
def test_a_row_that_lies_costs_its_sample_alone(whole, offset, value, size, reason):
    index = BetonFormat().index(lie(whole, ROWS + 40 + offset, value, size))
    assert [(error["key"], error["reason"]) for error in index.errors] == [("00000001", reason)]
    assert index.table()["key"].to_pylist() == ["k0", "k2", "k3"]


@pytest.mark.parametrize("value", [0, *HUGE[1:]])
def test_an_allocation_that_lies_costs_its_sample_alone(whole, value):
    table = int(np.frombuffer(whole[1][:24], HEADER)[0]["table_start"])
    index = BetonFormat().index(lie(whole, table + 48 + 16, value))
    assert [(error["key"], error["reason"]) for error in index.errors] == [("00000001", "bad_pointer")]
    assert index.num_samples == 3


def test_overlapping_allocations_are_read_as_they_are(whole):
    file, content = whole
    table = int(np.frombuffer(content[:24], HEADER)[0]["table_start"])
    rows = np.frombuffer(content[table:], ALLOCATION).copy()
    extra = rows.copy()
    extra["pointer"], extra["size"] = rows["pointer"] + 1, rows["size"] + 5
    with open(file.location, "wb") as stream:
        stream.write(bytes(content[:table]) + np.concatenate([extra, rows])[::-1].tobytes())
    index, found = read(file)
    assert (index.num_samples, index.errors) == (4, [])
    assert [key for key, _ in found] == ["k0", "k1", "k2", "k3"]


def attempt(file, entries):
    """What indexing says, and what reading the old entries gives; and that neither takes more memory than a list of as
    many errors as there is room for rows in the file."""
    tracemalloc.start()
    try:
        with contextlib.suppress(DataError):
            BetonFormat().index(file)
        found = BetonFormat().read(file, entries)
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()
    return found


def places(content):
    """Everything but the padding, which would swallow most of the blows."""
    start = int(np.frombuffer(content[: ROWS + 13], np.uint8)[ROWS + 5 : ROWS + 13].view("<u8")[0])
    return st.one_of(st.integers(0, ROWS + 4 * 40 - 1), st.integers(start, len(content) - 1))


@HARD
@given(data=st.data())
def test_no_damage_gives_other_content_or_anything_but_an_error(whole, data):
    file, content = whole
    with open(file.location, "wb") as stream:
        stream.write(content)
    index, before = read(file)
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(places(content))] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    changed = changed[: data.draw(st.just(len(content)) | st.integers(0, len(content)) | places(content))]
    with open(file.location, "wb") as stream:
        stream.write(changed)
    for old, new in zip(before, attempt(file, index.entries()), strict=True):
        if isinstance(new, SampleError):
            assert new.reason == "shard_changed"
        else:  # the key is no part of the uid; the bytes that train are
            assert decode.sample_uid(new[1]) == decode.sample_uid(old[1])
    untouched = changed == content
    assert not untouched or attempt(file, index.entries()) == before


def test_a_file_that_was_replaced_is_noticed_and_read_anew(tmp_path):
    first = [(f"k{seed}", parts_of(seed)) for seed in range(4)]
    file = write(tmp_path / "a.beton", first)
    index, _ = read(file)
    second = [(f"n{seed}", parts_of(seed + 9)) for seed in range(2)]
    write(tmp_path / "a.beton", second)
    assert [error.reason for error in BetonFormat().read(file, index.entries())] == ["shard_changed"] * 4
    assert come_back(second, read(file)[1])
    fields, values = [("caption", BYTES), ("image", RGB)], [b"hello", JPG]
    for step in (1, -1):  # the same header, other fields
        foreign(tmp_path / "a.beton", fields[::step], [values[::step]])
        assert read(file)[1] == [("00000000", {"jpg": JPG[2], "txt": b"hello"})]


def test_samples_are_read_in_any_order_and_as_often_as_asked(tmp_path):
    samples = [(f"k{seed}", parts_of(seed)) for seed in range(5)]
    file = write(tmp_path / "a.beton", samples)
    chosen = [4, 0, 0, 3]
    found = BetonFormat().read(file, BetonFormat().index(file).entries()[chosen])
    assert come_back([samples[number] for number in chosen], found)


def test_a_source_reads_betons_like_any_other_shard(tmp_path):
    for shard in range(2):
        samples = [(f"k{seed}", parts_of(seed)) for seed in range(shard * 3, shard * 3 + 3)]
        write(tmp_path / f"{shard}.beton", samples)
    source = ShardSource(shards=[str(tmp_path / f"{shard}.beton") for shard in range(2)])
    found = source.read(np.array([5, 0, 3]))
    assert [(sample.key, sample.shard, sample.parts) for sample in found] == [
        (f"k{seed}", f"{seed // 3}.beton", parts_of(seed)) for seed in (5, 0, 3)
    ]


def test_without_ffcv_its_loader_says_what_to_do():
    code = "import sys; sys.modules['ffcv'] = None; import vlm_train.data.ffcv_loader"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode
    assert "the ffcv package is not installed" in result.stderr
    assert "install_ffcv" in result.stderr
