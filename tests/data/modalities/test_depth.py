"""Depth follows the picture through crop, resizing and mirror; what is no grey PNG is told."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_train.data.decode import SampleError
from vlm_train.data.modalities.depth import read_depth
from vlm_train.data.rendering import render
from vlm_train.data.transforms import EvalTransform, Plan
from vlm_train.types import ImageSpec


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def smooth(width, height, seed):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def read(grey, plan):
    return read_depth({"depth.png": png(grey)}, {}, plan, (1, plan.size, plan.size))[0]


@settings(max_examples=60, deadline=None)
@given(
    side=st.tuples(st.integers(60, 200), st.integers(60, 200)), corner=st.tuples(*[st.floats(0, 1)] * 2),
    share=st.floats(0.5, 1), flip=st.booleans(), size=st.sampled_from([24, 48, 80]), seed=st.integers(0, 99),
)  # fmt: skip
def test_depth_stays_on_the_picture(side, corner, share, flip, size, seed):
    """A picture whose grey is its own depth goes the same way."""
    width, height = side
    box = round(width * share), round(height * share)
    left, top = (round(at * (whole - part)) for at, whole, part in zip(corner, side, box, strict=True))
    plan = Plan(width=width, height=height, box=(left, top, *box), resized=(size, size), size=size, flip=flip)
    grey = smooth(width, height, seed)
    pixels = render(np.repeat(grey[..., None], 3, axis=2), plan)[..., 0] / 255
    depth = read(grey, plan)
    assert depth.dtype == np.float32 and np.abs(depth - pixels).mean() < 0.02  # measured 0.009: rounding, kernels
    assert np.abs(depth[:, ::-1] - pixels).mean() > 0.02  # the twin: mirrored where the picture is not


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_evaluation_cuts_depth_as_it_cuts_pixels(resize):
    grey = smooth(150, 90, 3)
    plan = EvalTransform(spec=ImageSpec(size=32, resize=resize)).plan(150, 90, None)
    pixels = render(np.repeat(grey[..., None], 3, axis=2), plan)[..., 0] / 255
    assert np.abs(read(grey, plan) - pixels).mean() < 0.01
    half = np.asarray(Image.fromarray(grey).resize((75, 45), Image.Resampling.BOX))  # a map of another size
    assert np.abs(read(half, plan) - pixels).mean() < 0.02


def test_both_depths_of_grey_are_a_share_of_the_whole():
    plan = Plan(width=8, height=8, box=(0, 0, 8, 8), resized=(8, 8), size=8)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.allclose(read(grey, plan), grey / 255)
    fine = grey.astype(np.uint16) * 1000
    assert np.allclose(read(fine, plan), fine / 65535)
    assert read_depth({"png": png(grey)}, {}, plan, (1, 8, 8)) is None


GREY = png(smooth(40, 40, 0))


def claiming(side):
    """A PNG whose header says that it is larger."""
    header = GREY[12:16] + side.to_bytes(4, "big") * 2 + GREY[24:29]
    return GREY[:12] + header + zlib.crc32(header).to_bytes(4, "big") + GREY[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "depth_corrupt"), (b"far", "depth_corrupt"), (GREY[:-40], "depth_corrupt"),
        (png(np.zeros((4, 4, 3), np.uint8)), "depth_corrupt"),
        (claiming(1 << 20), "depth_too_large"), (claiming(9000), "depth_too_large"),
    ],
)  # fmt: skip
def test_what_is_no_depth_is_told(data, reason):
    with pytest.raises(SampleError) as caught:
        read_depth(
            {"depth.png": data}, {}, Plan(width=4, height=4, box=(0, 0, 4, 4), resized=(4, 4), size=4), (1, 4, 4)
        )
    assert caught.value.reason == reason
