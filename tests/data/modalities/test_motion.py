"""Readings over time: cut to their middle, filled with zeros; nothing is unpickled, no header is believed."""

import io

import numpy as np
import pytest

from vlm_train.data.decode import SampleError
from vlm_train.data.modalities.motion import decode_motion, read_motion
from vlm_train.data.transforms import Plan

PLAN = Plan(width=4, height=4, box=(0, 0, 4, 4), resized=(4, 4), size=4)


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def read(data, shape=(2, 6)):
    return read_motion({"motion.npy": data}, {}, PLAN, shape)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "<f2", "|u1"])
@pytest.mark.parametrize("length", [1, 6, 11])
def test_the_middle_of_what_is_longer_and_zeros_behind_what_is_shorter(dtype, length):
    readings = np.arange(2 * length).reshape(2, length).astype(dtype)
    for array in (readings, np.asfortranarray(readings)):
        found = read(npy(array))
        assert found.dtype == np.float32 and found.shape == (2, 6)
        start = max(0, length - 6) // 2
        assert np.array_equal(found[:, : min(6, length)], readings[:, start : start + 6].astype(np.float32))
        assert not found[:, length:].any()
    assert read_motion({}, {}, PLAN, (2, 6)) is None


GOOD = npy(np.zeros((2, 6), np.float32))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "motion_corrupt"), (b"numbers", "motion_corrupt"), (GOOD[:-1], "motion_corrupt"),
        (GOOD + b"x", "motion_corrupt"), (npy(np.zeros(6)), "motion_corrupt"),
        (npy(np.zeros((3, 6))), "motion_corrupt"), (npy(np.zeros((2, 0))), "motion_corrupt"),
        (npy(np.full((2, 6), np.nan)), "motion_corrupt"),
        (npy(np.full((2, 6), 1e300)), "motion_corrupt"), (npy(np.zeros((2, 6), complex)), "motion_corrupt"),
        (npy(np.array([[print]], object), allow_pickle=True), "motion_corrupt"),
        (GOOD.replace(b"(2, 6)", b"(-2,6)"), "motion_corrupt"),
        (GOOD.replace(b"(2, 6), }      ", b"(2, 6000000000)"), "motion_corrupt"),
        (GOOD.replace(b"(2, 6), }           ", b"(2, 6000000000), }  "), "motion_too_large"),
    ],
)  # fmt: skip
def test_what_is_no_motion_is_told(data, reason):
    with pytest.raises(SampleError) as caught:
        read(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("array", [np.zeros(6), np.zeros((2, 0)), np.full((2, 6), np.nan), np.full((2, 6), 1e300)])
def test_whoever_knows_no_number_of_channels_finds_it_too(array):
    with pytest.raises(SampleError):
        decode_motion(npy(array))
    assert decode_motion(GOOD).shape == (2, 6)
