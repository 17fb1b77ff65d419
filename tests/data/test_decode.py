import hashlib
import io
import json
import tracemalloc

import hostile
import numpy as np
import pytest
from data_fixtures import encoded, pixels
from hostile import saved
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_train.data import decode
from vlm_train.data.decode import SampleError, decode_captions, decode_metadata, open_image, sample_uid
from vlm_train.data.formats.base import ShardIndex


def reason_of(function, *args, **keys):
    with pytest.raises(SampleError) as caught:
        function(*args, **keys)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_are_exact(kind):
    array = pixels(0)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(open_image(encoded(array, kind, **options)).decode(), array)


def test_a_jpeg_is_decoded_as_pillow_does():
    data = encoded(pixels(0, 200, 160), quality=90)
    ours = open_image(data).decode().astype(int)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(ours - theirs).max() <= 2  # measured 0: both are libjpeg-turbo, of different releases


def test_a_jpeg_shrinks_while_decoding_but_never_below_what_is_needed():
    image = open_image(encoded(pixels(0, 200, 161), quality=90))
    assert image.decode().shape == (161, 200, 3)
    for wanted in range(1, 161):
        height, width, _ = image.decode(min_width=wanted, min_height=wanted).shape
        assert min(height, width) >= wanted
    assert image.decode(min_width=50, min_height=40).shape == (41, 50, 3)
    assert image.decode(min_width=51, min_height=40).shape == (81, 100, 3)
    image = open_image(encoded(pixels(0, 200, 160), quality=90))
    mean = image.decode().mean((0, 1)) - image.decode(min_width=25, min_height=20).mean((0, 1))
    assert np.abs(mean).max() < 1  # measured 0.1: the same picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(pixels(0, 48, 32), kind, exif=exif, **options)
    plain = encoded(pixels(0, 48, 32), kind, **options)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    wanted = Image.fromarray(open_image(plain).decode())
    wanted = np.asarray(wanted.transpose(turns[orientation]) if orientation > 1 else wanted)
    image = open_image(data)
    assert (image.height, image.width) == wanted.shape[:2]
    assert np.array_equal(image.decode(), wanted)
    if kind == "JPEG":
        assert (
            image.decode(min_width=wanted.shape[1] // 2, min_height=wanted.shape[0] // 2).shape[0] == len(wanted) // 2
        )


def test_nonsense_in_exif_is_no_orientation():
    assert open_image(encoded(pixels(0), exif=b"Exif\0\0nonsense")).orientation == 1


def test_transparency_is_shown_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (255, 0, 0, 255)
    image = open_image(encoded(rgba, "PNG")).decode()
    assert image[0, 0].tolist() == [255, 0, 0] and image[3, 3].tolist() == [255, 255, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 255])
    shown = open_image(saved(palette, "PNG", transparency=0)).decode()
    assert shown.tolist() == [[[255, 255, 255], [0, 0, 255]]]
    grey = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 0)])
    assert (open_image(saved(grey, "PNG")).decode() == 255).all()


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        data = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert open_image(data).decode()[0, 0].tolist() == [255, 0, 0]


def test_cmyk_grey_and_16_bit():
    array = pixels(0, 32, 32)
    cmyk = saved(Image.fromarray(array).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(open_image(cmyk).decode().astype(int) - array).mean() < 2  # measured 0.4
    grey = saved(Image.fromarray(array).convert("L"), "JPEG")
    shown = open_image(grey).decode()
    assert shown.shape == (32, 32, 3) and (shown[..., 0] == shown[..., 2]).all()
    deep = saved(Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)), "PNG")
    assert open_image(deep).decode()[0, :, 1].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
def test_four_colours_are_right(kind):
    array = pixels(0, 64, 48)
    image = open_image(hostile.four_colours(array, kind))
    assert np.abs(image.decode().astype(int) - array).mean() < 2  # measured 0.3 and 1
    assert np.abs(255 - image.decode().astype(int) - array).mean() > 50  # the usual mistake: inverted


def test_16_bits_a_channel_keep_the_high_byte():
    values = np.array([[[0, 255, 256], [65535, 4660, 32767]]], ">u2")
    deep = open_image(hostile.deep_png([row.tobytes() for row in values], 2)).decode()
    assert deep.tolist() == [[[0, 0, 1], [255, 18, 127]]]
    grey = open_image(hostile.deep_png([np.array([0, 255, 256, 65535], ">u2").tobytes()], 0)).decode()
    assert grey.tolist() == [[[0] * 3, [0] * 3, [1] * 3, [255] * 3]]


def test_one_bit_palette_and_grey_with_alpha():
    bits = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    assert open_image(saved(bits, "PNG")).decode().tolist() == [[[0] * 3, [255] * 3, [0] * 3]]
    palette = Image.fromarray(np.array([[2, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 10, 20, 30, 200, 100, 50])
    for kind in ("PNG", "GIF", "BMP"):
        assert open_image(saved(palette, kind)).decode().tolist() == [[[200, 100, 50], [10, 20, 30]]]
    grey = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)])  # a fifth of it on white
    assert open_image(saved(grey, "PNG")).decode().tolist() == [[[224] * 3]]


def test_a_ppm_is_its_pixels_and_is_not_copied():
    array = pixels(3, 17, 9)
    data = b"P6\n17 9\n255\n" + array.tobytes()
    image = open_image(data)
    shown = image.decode(min_width=4, min_height=4, fast=True)
    assert (image.width, image.height) == (17, 9) and np.array_equal(shown, array)
    assert np.shares_memory(shown, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"P6\n2 2\n255\n" + bytes(11), "image_truncated"),
        (b"P6\n2 2\n255\n", "image_truncated"),
        (b"P6\n2 2\n255\n" + bytes(13), "image_corrupt"),
        (b"P6\n0 2\n255\n", "image_unknown"),
        (b"P6\n-2 -2\n255\n" + bytes(12), "image_unknown"),
        (b"P6\n2 2\n65535\n" + bytes(24), "image_unknown"),
        (b"P6\n# a comment\n2 2\n255\n" + bytes(12), "image_unknown"),
        (b"P6\n" + b"9" * 400 + b" 1\n255\n", "image_unknown"),
        (b"P6", "image_unknown"),
    ],
)
def test_a_ppm_of_another_size_than_it_says(data, reason):
    assert reason_of(lambda: open_image(data).decode()) == reason


@pytest.mark.parametrize("sides", [(8193, 8192), (8193, 8193), (16383, 16383)])
@pytest.mark.parametrize("name", hostile.BOMBS)
def test_a_small_file_that_asks_for_gigabytes_gets_nothing(name, sides):
    data = hostile.BOMBS[name](*sides)
    assert len(data) < 4096
    tracemalloc.start()
    try:
        assert reason_of(open_image, data) == "image_too_large"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [name for name in hostile.BOMBS if name != "huge_gif_screen"])
def test_a_header_that_lies_within_the_cap_is_a_bad_image(name):
    """The same makers, small enough to be opened: it was the cap, and not another fault, that refused them above."""
    image = open_image(hostile.BOMBS[name](600, 500))
    assert (image.width, image.height) == (600, 500)
    if name != "huge_gif_frame":  # a GIF's missing rows are background by its definition
        assert reason_of(image.decode) in ("image_truncated", "image_corrupt")


def test_a_text_chunk_that_unpacks_to_megabytes_is_refused():
    data = hostile.text_bomb()
    assert len(data) < 1 << 17
    tracemalloc.start()
    try:
        assert reason_of(lambda: open_image(data).decode()) in ("image_unknown", "image_corrupt")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_many_scans_is_refused(mode):
    data = saved(Image.fromarray(pixels(0)).convert(mode), "JPEG", progressive=True)
    assert open_image(data).decode().shape == (20, 24, 3)
    assert reason_of(open_image, hostile.many_scans(300, data)) == "image_corrupt"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_half_a_jpeg_is_truncated_in_every_colour_space(mode):
    """With an end marker behind it too, where Pillow alone would return a half grey picture."""
    data = saved(Image.fromarray(pixels(0, 200, 160)).convert(mode), "JPEG")
    for cut in (data[: len(data) // 2], data[: len(data) // 2] + b"\xff\xd9"):
        assert reason_of(open_image(cut).decode) == "image_truncated"


def test_a_truncated_image_is_an_error_and_not_half_a_picture():
    jpeg, png = encoded(pixels(0, 200, 160)), encoded(pixels(0, 200, 160), "PNG")
    assert reason_of(open_image(jpeg[: len(jpeg) // 2]).decode) == "image_truncated"
    assert reason_of(open_image(jpeg[: len(jpeg) // 2] + b"\xff\xd9").decode) == "image_truncated"
    assert reason_of(open_image(png[: len(png) // 2]).decode) == "image_truncated"
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 255
    assert reason_of(open_image(bytes(damaged)).decode) in ("image_corrupt", "image_truncated")
    assert reason_of(open_image, b"") == reason_of(open_image, b"GIF89a") == "image_unknown"


def test_formats_that_run_programs_are_not_opened():
    assert reason_of(open_image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "image_unknown"


def test_the_pixel_cap(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 24 * 20 - 1)
    for kind in ("JPEG", "PNG"):
        assert reason_of(open_image, encoded(pixels(0), kind)) == "image_too_large"


def test_captions():
    def captions(parts, metadata=None):
        return decode_captions(parts, metadata or {})

    assert captions({"txt": b"  a\0 dog \n"}) == ["a dog"]
    assert captions({"txt": b"a"}, {"captions": ["b", "a", " "], "caption": "c"}) == ["a", "b", "c"]
    assert captions({}, {"caption": "c"}) == ["c"]
    assert captions({"txt": b"a"}, {"caption": None, "captions": None}) == ["a"]
    assert len(captions({"txt": b"x" * 10_000})[0]) == decode.MAX_CAPTION_CHARS
    assert reason_of(captions, {"txt": b"\xff"}) == "caption_utf8"
    assert reason_of(captions, {}, {"captions": ["\ud800"]}) == "caption_utf8"
    assert reason_of(captions, {"txt": b" \0 "}) == "no_caption"
    assert reason_of(captions, {"txt": b"a"}, {"captions": [1]}) == "metadata_captions"


def test_the_text_of_strangers():
    def captions(txt, **metadata):
        return decode_captions({} if txt is None else {"txt": txt}, metadata)

    assert captions(b"\xef\xbb\xbfa dog") == ["a dog"]
    assert captions("\u00e9t\u00e9 \U0001f436".encode()) == ["\u00e9t\u00e9 \U0001f436"]
    for other in ("\u00e9t\u00e9".encode("latin-1"), "a dog".encode("utf-16"), b"a \xed\xa0\x80", b"\xc0\x80"):
        assert reason_of(captions, other) == "caption_utf8"
    assert captions(b"\0a\0 dog\0") == ["a dog"]
    assert captions(("\U0001f436" * 25_000).encode()) == ["\U0001f436" * decode.MAX_CAPTION_CHARS]  # 100 kB
    assert captions(b"x" * 100_000, captions=["y" * 100_000]) == ["x" * 4096, "y" * 4096]
    assert reason_of(captions, None, captions=["a", "\udc36\ud83d"]) == "caption_utf8"
    assert reason_of(captions, b"a", caption="\ud83d") == "caption_utf8"
    assert reason_of(captions, b"") == reason_of(captions, None) == reason_of(captions, None, caption=7) == "no_caption"
    assert (
        reason_of(captions, None, captions={"a": 1}) == reason_of(captions, b"a", captions="b") == "metadata_captions"
    )


def test_the_metadata_of_strangers():
    def metadata(content):
        return decode_metadata({"json": content})

    assert np.isnan(metadata(b'{"similarity": NaN}')["similarity"])
    assert metadata(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert decode_captions({}, metadata(b'{"caption": "\\ud83d\\udc36"}')) == ["\U0001f436"]  # a whole pair is one
    assert metadata(json.dumps({"a": [[[7]]] * 1000}).encode())["a"][999] == [[7]]
    for content in (
        b"",
        b"\0",
        b'{"a": 1}\0',
        b'{"a": 1',
        b"NaN",
        b'"a"',
        "{}".encode("utf-16"),
        b'{"a": "\xe9"}',
        b'{"a": ' * 100_000,
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 10_000 + b"}",
    ):
        assert reason_of(metadata, content) == "metadata_json"


def test_a_label_is_an_integer_of_64_bits():
    for label in (0, -1, 7, (1 << 63) - 1, -(1 << 63)):
        assert decode.decode_label({"label": label}) == label
    for label in (1 << 63, -(1 << 63) - 1, True, 1.0, float("nan"), "7", None, [1]):
        assert decode.decode_label({"label": label}) is None
    assert decode.decode_label({}) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(1 << 66), 1 << 66) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=200, deadline=None)
@given(label=JSON)
@example(label=99999999999999999999)
@example(label=True)
@example(label=3.0)
def test_a_label_is_the_same_to_the_manifest_and_to_a_batch_whatever_it_is(label):
    index = ShardIndex("a.tar")
    parts = {"jpg": encoded(pixels(0)), "txt": b"a", "json": json.dumps({"label": label}).encode()}
    index.add(parts, key="k", number=0, offset=0, length=1, parts=[])
    fits = type(label) is int and -(1 << 63) <= label < 1 << 63
    assert index.table()["label"].to_pylist() == [label if fits else None]
    assert decode.decode_label(decode_metadata(parts)) == (label if fits else None)


@pytest.mark.parametrize("captions", ["", "one", 0, 1, False, {}, {"a": 1}, [1], ["one", None], [["one"]], 0.0])
def test_captions_that_are_no_list_of_texts_are_never_passed_over(captions):
    assert reason_of(decode_captions, {"txt": b"a"}, {"captions": captions}) == "metadata_captions"
    for nothing in (None, []):
        assert decode_captions({"txt": b"a"}, {"captions": nothing}) == ["a"]


def test_metadata_must_be_an_object():
    assert decode_metadata({}) == {}
    assert decode_metadata({"json": b'{"a": 1}'}) == {"a": 1}
    for content in (b"[]", b"{", b"\xff", b"[" * 100_000):
        assert reason_of(decode_metadata, {"json": content}) == "metadata_json"


SOME = st.sampled_from([b"", b"x", b"y", b"xy", b"yx", b"i", b"t", b"m", b"t" + (1).to_bytes(8, "little") + b"x"])
READ = st.fixed_dictionaries({}, optional=dict.fromkeys(("jpg", "0.png", "1.jpg", "txt", "json"), SOME))


@settings(max_examples=500, deadline=None)
@given(one=READ, two=READ)
def test_two_samples_have_one_uid_where_all_that_is_read_is_the_same_and_only_there(one, two):
    def read(parts):
        return [parts[name] for name in decode.image_parts(parts)], parts.get("txt"), parts.get("json")

    assert (sample_uid(one) == sample_uid(two)) == (read(one) == read(two))


def test_no_byte_goes_over_from_one_part_to_the_next():
    assert sample_uid({"jpg": b"img" + b"xy", "txt": b"z"}) != sample_uid({"jpg": b"img" + b"x", "txt": b"yz"})
    assert sample_uid({"jpg": b"", "txt": b"bc", "json": b"d"}) != sample_uid({"jpg": b"", "txt": b"b", "json": b"cd"})
    assert sample_uid({"jpg": b"a", "txt": b"b"}) != sample_uid({"jpg": b"a", "json": b"b"})
    assert sample_uid({"0.jpg": b"a", "1.jpg": b"b"}) != sample_uid({"0.jpg": b"ab"})


def test_the_uid_is_what_the_documentation_says():
    framed = b"".join(role + len(part).to_bytes(8, "little") + part for role, part in ((b"i", b"one"), (b"i", b"two")))
    framed += b"t" + (1).to_bytes(8, "little") + b"c" + b"m" + (2).to_bytes(8, "little") + b"{}"
    parts = {"json": b"{}", "1.jpg": b"two", "txt": b"c", "0.jpg": b"one", "cls": b"what nobody reads"}
    assert sample_uid(parts) == hashlib.sha256(framed).digest()[:16]


def test_the_hash_of_the_images_is_of_them_alone():
    one, other = {"jpg": b"a", "txt": b"b"}, {"jpg": b"a", "txt": b"c", "json": b"{}"}
    (uid, images), (other_uid, other_images) = map(decode.sample_hashes, (one, other))
    assert uid != other_uid and images == other_images != decode.sample_hashes({**one, "jpg": b"b"})[1]


def test_the_order_of_images_is_that_of_their_numbers():
    assert sample_uid({"1.jpg": b"a", "0.jpg": b"b", "txt": b"c"}) == sample_uid(
        {"0.jpg": b"b", "1.jpg": b"a", "txt": b"c"}
    )
    assert sample_uid({"0.jpg": b"a", "1.jpg": b"b", "txt": b"c"}) != sample_uid(
        {"0.jpg": b"b", "1.jpg": b"a", "txt": b"c"}
    )
    assert decode.image_parts({"10.jpg": b"", "2.png": b"", "jpg": b"", "seg.png": b""}) == ["jpg", "2.png", "10.jpg"]
    no_images = {"jpg\n": b"", "9" * 5000 + ".jpg": b"", "٣.jpg": b"", ".jpg": b"", "-1.jpg": b"", "xjpg": b""}
    assert decode.image_parts(no_images) == []


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), data=st.data())
def test_hostile_bytes_raise_sample_errors_only(kind, data):
    content = bytearray(encoded(pixels(0), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    try:
        image = open_image(bytes(content))
        assert image.decode(min_width=8, min_height=8, fast=data.draw(st.booleans())).dtype == np.uint8
    except SampleError as error:
        assert error.reason.startswith("image_")


@pytest.mark.parametrize(
    ("turns", "caption"),
    [
        ([{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}], ["red"]),
        (
            [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " a cat "}, {"from": "gpt", "value": "b"}],
            ["a cat"],
        ),
        ([{"role": "assistant", "content": 3}, {"role": "assistant", "content": "later"}], None),
        ([{"role": ["assistant"], "content": "x"}, "text", None], None),
        ("assistant", None),
    ],
)
def test_the_caption_of_a_dialogue_without_one_is_its_first_answer(turns: object, caption: list[str] | None) -> None:
    metadata = {"conversations": turns}
    if caption is None:
        with pytest.raises(SampleError, match="no_caption"):
            decode_captions({}, metadata)
    else:
        assert decode_captions({}, metadata) == caption
    assert decode_captions({"txt": b"own"}, metadata) == decode_captions({}, {**metadata, "caption": "own"}) == ["own"]
