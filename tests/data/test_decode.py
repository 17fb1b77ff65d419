import io

import numpy as np
import pytest
from data_fixtures import encoded, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_train.data import decode
from vlm_train.data.decode import SampleError, decode_captions, decode_metadata, open_image, sample_uid


def reason_of(function, *args):
    with pytest.raises(SampleError) as caught:
        function(*args)
    return caught.value.reason


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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


def test_metadata_must_be_an_object():
    assert decode_metadata({}) == {}
    assert decode_metadata({"json": b'{"a": 1}'}) == {"a": 1}
    for content in (b"[]", b"{", b"\xff", b"[" * 100_000):
        assert reason_of(decode_metadata, {"json": content}) == "metadata_json"


def test_the_uid_names_images_and_captions_and_nothing_else():
    parts = {"jpg": b"a", "txt": b"b", "json": b"{}"}
    uid = sample_uid(parts)
    assert len(uid) == 16 and sample_uid({**parts, "json": b'{"x": 1}'}) == uid
    assert sample_uid({**parts, "txt": b"c"}) != uid != sample_uid({**parts, "jpg": b"c"})
    assert sample_uid({"1.jpg": b"a", "0.jpg": b"b", "txt": b"c"}) == sample_uid(
        {"0.jpg": b"b", "1.jpg": b"a", "txt": b"c"}
    )
    assert sample_uid({"0.jpg": b"a", "1.jpg": b"b", "txt": b"c"}) != sample_uid(
        {"0.jpg": b"b", "1.jpg": b"a", "txt": b"c"}
    )
    assert decode.image_parts({"10.jpg": b"", "2.png": b"", "jpg": b"", "seg.png": b""}) == ["jpg", "2.png", "10.jpg"]


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), data=st.data())
def test_hostile_bytes_raise_sample_errors_only(kind, data):
    content = bytearray(encoded(pixels(0), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    try:
        image = open_image(bytes(content))
        assert image.decode(min_width=8, min_height=8).dtype == np.uint8
    except SampleError as error:
        assert error.reason.startswith("image_")
