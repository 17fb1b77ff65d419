"""The one tag of EXIF that counts is read as Pillow reads it; damage in the others is passed over in silence."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from data_fixtures import encoded, pixels
from hostile import four_colours, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_train.data.decode import open_image
from vlm_train.data.exif import orientation_of

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 7: 1, 9: 4}  # of a value, by type


def exif_of(entries, *, order="<", start=8, prefix=b"Exif\0\0"):
    """A directory of (tag, type, count, four bytes) entries at `start`."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    listed = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    return prefix + head.ljust(start, b"\0") + struct.pack(f"{order}H", len(entries)) + listed + bytes(4)


def of_pillow(exif):
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags.load(exif)
            value = tags.get(0x0112, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


@st.composite
def directories(draw):
    order = draw(st.sampled_from("<>"))
    tags = draw(st.lists(st.sampled_from([0x0100, 0x010F, 0x0112, 0x011A, 0x8769]), unique=True, max_size=5))
    entries = []
    for tag in tags:
        kind, value = draw(st.sampled_from([3, 4])), draw(st.integers(0, 10))
        if tag == 0x0112:
            entries.append((tag, kind, 1, struct.pack(order + {3: "HH", 4: "I"}[kind], *([value] + [0] * (kind == 3)))))
        else:
            kind = draw(st.sampled_from(sorted(SIZES)))
            count = draw(st.integers(0, 4 // SIZES[kind]))  # what is not within the entry Pillow must find
            entries.append((tag, kind, count, draw(st.binary(min_size=4, max_size=4))))
    prefix = draw(st.sampled_from([b"", b"Exif\0\0", b"Exif\0\0" * 2]))
    return exif_of(entries, order=order, start=draw(st.sampled_from([8, 10, 26])), prefix=prefix)


@settings(max_examples=300, deadline=None)
@given(exif=directories())
def test_the_orientation_is_that_of_pillow(exif):
    assert orientation_of(exif) == of_pillow(exif)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", range(10))
def test_each_orientation_is_told(order, value):
    short = struct.pack(f"{order}HH", value, 0)
    assert orientation_of(exif_of([(0x0112, 3, 1, short)], order=order)) == (value if 1 <= value <= 8 else 1)


@settings(max_examples=300, deadline=None)
@given(exif=directories() | st.binary(max_size=60), data=st.data())
def test_no_damage_gives_anything_but_an_orientation(exif, data):
    damaged = bytearray(exif)
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert orientation_of(bytes(damaged[: data.draw(st.integers(0, len(damaged)))])) in range(1, 9)
    assert orientation_of(None) == orientation_of(b"") == 1


GARBLED = exif_of([(0x010F, 2, 4000, b"\xff\0\0\0"), (0x0112, 3, 1, b"\6\0\0\0"), (0x011A, 5, 1, b"\xff\xff\0\0")])
BROKEN_OFF = GARBLED[:36]


def cmyk(exif):
    data = four_colours(pixels(1), "CMYK")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def animated_wrongly():
    """A PNG that says it is an animation of no frames."""
    data = encoded(pixels(1), "PNG")
    chunk = b"acTL" + struct.pack(">II", 0, 0)
    return data[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def palette_with_alpha():
    image = Image.fromarray(pixels(1)).quantize(8)
    return saved(image, "PNG", transparency=bytes([0, 128] * 4))


@pytest.mark.parametrize("exif", [GARBLED, BROKEN_OFF], ids=["garbled", "broken off"])
@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP"])
def test_garbled_exif_is_no_word_worth(kind, exif):
    with pytest.warns(UserWarning):  # what Pillow has to say
        Image.Exif().load(exif)
    data = cmyk(exif) if kind == "CMYK" else encoded(pixels(1), kind, exif=exif)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = open_image(data)
        assert image.decode().shape == (image.height, image.width, 3)
        assert image.orientation == (6 if exif is GARBLED else 1)
        warnings.warn("of somebody else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in said] == ["of somebody else"]
    assert warnings.filters == before


@pytest.mark.parametrize("make", [animated_wrongly, palette_with_alpha])
def test_nor_is_other_metadata_that_pillow_cannot_use(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(open_image(make()).decode()).shape == (20, 24, 3)
