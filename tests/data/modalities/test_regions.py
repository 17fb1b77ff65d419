"""Regions of KEY.json as numbers: boxes follow the crop and the mirror, names fall into buckets, nonsense is told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.decode import SampleError
from vlm_train.data.modalities.regions import read_regions
from vlm_train.data.transforms import Plan
from vlm_train.types import NUM_REGION_BUCKETS

WHOLE = Plan(width=200, height=100, box=(0, 0, 200, 100), resized=(64, 64), size=64)


def region(box, name="circle", attributes=("red", "small")):
    return {"box": list(box), "class": name, "attributes": list(attributes), "phrase": "x"}


def encoded(*regions, plan=WHOLE, num=4):
    return read_regions({}, {"regions": list(regions)}, plan, (num, 8))


def test_a_box_is_told_in_thousandths_of_the_square():
    rows = encoded(region((50, 25, 100, 100)))
    assert rows.shape == (4, 8) and rows[0, :4].tolist() == [250, 250, 500, 1000] and not rows[1:].any()
    assert (rows[0, 4:7] > 0).all() and (rows[0, 4:7] < NUM_REGION_BUCKETS).all() and rows[0, 7] == 0
    mirrored = encoded(region((50, 25, 100, 100)), plan=Plan(**{**plan_fields(WHOLE), "flip": True}))
    assert mirrored[0, :4].tolist() == [500, 250, 750, 1000]


def plan_fields(plan):
    return {name: getattr(plan, name) for name in ("width", "height", "box", "resized", "size", "exact", "flip")}


@settings(max_examples=60, deadline=None)
@given(
    corners=st.tuples(*[st.integers(0, 99)] * 4), crop=st.tuples(*[st.integers(0, 90)] * 2), side=st.integers(10, 100)
)
def test_what_is_kept_lies_where_the_crop_puts_it(corners, crop, side):
    """Against marking the pixels of the box and cropping these."""
    left, top = min(corners[0], corners[2]), min(corners[1], corners[3])
    box = (left, top, max(corners[0], corners[2]) + 1, max(corners[1], corners[3]) + 1)
    width, height = min(side, 100 - crop[0]), min(side, 100 - crop[1])
    plan = Plan(width=100, height=100, box=(*crop, width, height), resized=(50, 50), size=50)
    marked = np.zeros((100, 100), bool)
    marked[box[1] : box[3], box[0] : box[2]] = True
    cut = marked[crop[1] : crop[1] + height, crop[0] : crop[0] + width]
    rows = encoded(region(box), plan=plan)
    assert bool(rows.any()) == (2 * cut.sum() >= marked.sum())
    if rows.any():
        columns, lines = np.flatnonzero(cut.any(0)), np.flatnonzero(cut.any(1))
        expected = [columns[0] / width, lines[0] / height, (columns[-1] + 1) / width, (lines[-1] + 1) / height]
        assert np.abs(rows[0, :4] / 1000 - expected).max() <= 0.0005 + 1e-12


def test_equal_names_are_equal_and_other_names_are_not():
    first, second, third = encoded(
        region((0, 0, 9, 9), "circle", ["red"]),
        region((0, 0, 9, 9), " Circle ", ["red"]),
        region((0, 0, 9, 9), "square"),
    )[:3]
    assert np.array_equal(first, second) and first[4] != third[4]
    many = encoded(region((0, 0, 9, 9), "a", list("bcdefg")))
    assert (many[0, 4:] > 0).all()
    assert len(encoded(*[region((0, 0, 9, 9))] * 9)) == 4  # the first that are asked for


@pytest.mark.parametrize(
    "regions",
    [
        5, "abc", [5], [{}], [{"box": [0, 0, 1], "class": "a"}], [{"box": [0, 0, 1, 1]}],
        [{"box": [3, 0, 1, 1], "class": "a"}],
        [{"box": [0, 0, float("nan"), 1], "class": "a"}], [{"box": "0011", "class": "a"}],
        [{"box": [0, 0, 1, 1], "class": 3}], [{"box": [0, 0, 1, 1], "class": "a", "attributes": [1]}],
        [{"box": [0, 0, 1, 1], "class": "a", "attributes": 1}],
    ],
)  # fmt: skip
def test_what_is_no_region_is_told(regions):
    with pytest.raises(SampleError) as caught:
        read_regions({}, {"regions": regions}, WHOLE, (4, 8))
    assert caught.value.reason == "metadata_regions"


def test_none_is_no_region():
    for metadata in ({}, {"regions": None}):
        assert read_regions({}, metadata, WHOLE, (3, 8)) is None
    assert not encoded().any()  # told to be empty
