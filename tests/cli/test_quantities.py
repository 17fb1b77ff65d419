"""Quantities as people read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.cli.quantities import count, figures, many, money, size, span


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (figures(0), "0"), (figures(1e-9), "< 0.001"), (figures(0.28), "0.28"), (figures(99.6), "100"),
        (figures(1570), "1,570"), (span(1e-5), "0.01 ms"), (span(0.5), "500 ms"), (span(1), "1 s"),
        (span(100), "1.67 min"), (span(6000), "1.67 h"), (span(71.9 * 3600), "71.9 h"), (span(96 * 3600), "4 days"),
        (span(1e9), "11,574 days"), (money(0), "$0.00"), (money(1e-7), "< $0.01"), (money(2.5), "$2.50"),
        (money(2144.2), "$2,144"), (size(14.5e6), "14.5 MB"), (size(1.57e12), "1,570 GB"), (count(64), "64"),
        (count(35840), "35.8 k"), (count(2e15), "2,000 T"), (many(1, "step", "steps"), "1 step"),
        (many(1000, "step", "steps"), "1,000 steps"), (many(0, "step", "steps"), "0 steps"),
    ],
)  # fmt: skip
def test_a_quantity_reads_well(told: str, expected: str) -> None:
    assert told == expected


@given(st.floats(min_value=1e-12, max_value=1e15))
def test_none_has_a_power_of_ten_and_all_are_near(value: float) -> None:
    for told in (figures(value), span(value), money(value), size(value), count(value)):
        assert not re.search(r"\de[+-]?\d", told)
    if value >= 0.001:
        assert float(figures(value).replace(",", "")) == pytest.approx(value, rel=0.006)
    assert re.search(r"\de[+-]?\d", f"{1570.0:.3g}")  # the twin
