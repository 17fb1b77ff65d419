"""Charts tell the truth about a curve: nothing is lost by condensing, ticks lie inside, gaps are told."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from vlm_train.engine.charts import Chart, Series, condense, number, share, ticks

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=700)


@given(values=VALUES, max_points=st.integers(1, 300))
def test_condensing_keeps_every_extreme_and_every_value_counts(values: list[float], max_points: int) -> None:
    points = condense(list(enumerate(values)), max_points)
    assert len(points) <= max_points
    assert min(p.low for p in points) == min(values) and max(p.high for p in points) == max(values)
    assert all(p.low - 1e-6 <= p.mean <= p.high + 1e-6 for p in points)
    assert [p.step for p in points] == sorted(p.step for p in points)


def test_a_spike_is_never_lost() -> None:
    values = [1.0] * 500
    values[251] = 9.0
    assert max(point.high for point in condense(list(enumerate(values)), 100)) == 9.0
    assert max(values[::5]) == 1.0  # the wrong twin: every fifth value


@given(low=st.floats(-1e5, 1e5), width=st.floats(1e-3, 1e6), num=st.integers(2, 6))
def test_ticks_are_round_and_inside(low: float, width: float, num: int) -> None:
    found = ticks(low, low + width, num)
    slack = width * 1e-6
    assert all(low - slack <= tick <= low + width + slack for tick in found)
    assert 1 <= len(found) <= 2 * num + 1
    if len(found) > 1:
        step = found[1] - found[0]
        digits = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(digits - round_number) for round_number in (1, 2, 5, 10)) < 1e-3


class Balance(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_chart_is_sound_html_with_words_for_those_who_do_not_see_it() -> None:
    series = Series(name="R@1 <b>", steps=[1, 2, 3, 4], values=[1.0, None, math.nan, 3.0], baseline=0.5)
    html = Chart(title="Loss & co", series=[series], markers=[(2, "resumed after step 2")]).html()
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert "Loss &amp; co" in html and "R@1 &lt;b&gt;" in html and "<b>&gt;" not in html
    assert "from 1 at step 1 to 3 at step 4, lowest 1, highest 3" in html
    assert "2 values not finite" in html and "resumed after step 2" in html
    assert html.count('class="base') == 1 and 'class="mark"' in html
    numbers = [float(text) for text in re.findall(r"-?\d+\.\d+", "".join(re.findall(r'points="([^"]*)"', html)))]
    assert numbers and all(0 <= value <= 1000 for value in numbers)


def test_a_chart_over_something_else_than_steps_says_so() -> None:
    series, names = [Series(name="a", steps=[0, 1, 2], values=[1.0, 2.0, 3.0])], ["0.001", "<1>", "0.1"]
    html = Chart(title="t", series=series, step_name="eps", step_form=lambda place: names[round(place)]).html()
    assert "from 1 at eps 0.001 to 3 at eps 0.1" in html and ">&lt;1&gt;</span>" in html and "step" not in html


def test_a_chart_without_a_finite_value_is_nothing() -> None:
    assert Chart(title="t", series=[Series(name="a", steps=[1], values=[None])]).html() == ""
    assert "at step 1" in Chart(title="t", series=[Series(name="a", steps=[1], values=[2.0])]).html()


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.0005, 0.25, 14.2857, 12345.6, 2e9)] == [
        "0",
        "5e-4",
        "0.25",
        "14.3",
        "12,346",
        "2e9",
    ]
    assert share(0.0123) == "1.23 %"
