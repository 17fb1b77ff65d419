"""Bars are as high as their counts say, and a limit stands where its value lies among them."""

from __future__ import annotations

import re

import pytest

from vlm_train.cli import sheets


def test_bars_are_as_high_as_counts_and_a_limit_stands_between_them() -> None:
    html = sheets.histogram("<h>", [0, 1, 2, 4], [5, 0, 10], mark=("limit", 3.0))
    assert [float(text) for text in re.findall(r"height:([0-9.]+)%", html)] == [50, 0, 100]
    (place,) = re.findall(r"left:([0-9.]+)%", html)
    assert float(place) == pytest.approx(250 / 3, abs=0.01)  # in the middle of the last of three bars
    assert "&lt;h&gt;" in html and "<h>" not in html and html.count("class=none") == 1


@pytest.mark.parametrize(("value", "place"), [(-5.0, 0.0), (0.0, 0.0), (4.0, 100.0), (99.0, 100.0)])
def test_a_limit_beyond_the_bars_stands_at_their_end(value: float, place: float) -> None:
    html = sheets.histogram("h", [0, 1, 2, 4], [5, 0, 10], mark=("limit", value))
    assert f"left:{place:.2f}%" in html
    assert "left:" not in sheets.histogram("h", [0, 1, 2, 4], [5, 0, 10])


def test_groups_of_unlike_size_are_compared_in_shares_of_their_own() -> None:
    html = sheets.comparison("h", [0, 1, 2], [("kept", [100, 300]), ("dropped", [3, 1])])
    assert [float(text) for text in re.findall(r"height:([0-9.]+)%", html)] == pytest.approx([33.3, 100, 100, 33.3])
    empty = sheets.comparison("h", [0, 1, 2], [("kept", [0, 0]), ("dropped", [0, 0])])
    assert set(re.findall(r"height:([0-9.]+)%", empty)) == {"0.0"}
