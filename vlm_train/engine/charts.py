"""Line charts as HTML with inline SVG: they scale to any width, follow light and dark, and need nothing else.

The curve is an SVG stretched over its box (`preserveAspectRatio="none"`, strokes that do not scale); the numbers on the
axes are HTML placed in per cent, so they stay readable on a phone. A long run is condensed to a few hundred points:
the mean of each stretch as the line, its lowest and highest value as a band behind it, so no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

_MAX_POINTS = 300
_WIDTH, _HEIGHT = 1000.0, 1000.0

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Point:
    """One stretch of a curve."""

    step: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A curve. `baseline`: what a model that knows nothing scores, drawn dashed."""

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]
    baseline: float | None = None

    def finite(self) -> list[tuple[float, float]]:
        """(step, value) where there is a finite value."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One or more curves over the same steps.

    Args:
        title: what is drawn.
        series: the curves.
        form: a value as text.
        markers: (step, what happened there), drawn as vertical lines.
        from_zero: whether the axis must show 0.
        step_name: what the curves run over.
        step_form: a step as text.
    """

    title: str
    series: Sequence[Series]
    form: Format = field(default=lambda value: number(value))
    markers: Sequence[tuple[float, str]] = ()
    from_zero: bool = False
    step_name: str = "step"
    step_form: Format = field(default=lambda step: f"{step:,.0f}")

    def html(self) -> str:
        """The figure; empty where there is no finite value at all."""
        curves = [(series, condense(series.finite())) for series in self.series]
        curves = [(series, points) for series, points in curves if points]
        if not curves:
            return ""
        axes = _Axes.around(curves, self.from_zero)
        shapes = "".join(_shapes(place, series, points, axes) for place, (series, points) in enumerate(curves))
        markers = "".join(_marker(axes, step, label) for step, label in self.markers)
        ys = "".join(
            f'<span style="top:{100 - 100 * axes.y(tick):.2f}%">{escape(self.form(tick))}</span>'
            for tick in axes.y_ticks
        )
        grid = "".join(f'<line class="grid" {_across(axes.y(tick))}/>' for tick in axes.y_ticks)
        xs = "".join(
            f'<span style="left:{100 * axes.x(tick):.2f}%">{escape(self.step_form(tick))}</span>'
            for tick in axes.x_ticks
        )
        return (
            f'<figure class="chart"><figcaption><b>{escape(self.title)}</b>{self._legend(curves)}</figcaption>'
            f'<div class="plot" role="img" aria-label="{escape(self._spoken(curves))}">'
            f'<div class="ys" aria-hidden="true">{ys}</div>'
            f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" aria-hidden="true">'
            f'{grid}{markers}{shapes}</svg><div class="xs" aria-hidden="true">{xs}</div></div></figure>'
        )

    def _legend(self, curves: list[tuple[Series, list[Point]]]) -> str:
        chips = "".join(
            f'<span class="chip c{place % 6}">{escape(series.name)} '
            f"<b>{escape(self.form(series.finite()[-1][1]))}</b></span>"
            for place, (series, _) in enumerate(curves)
        )
        bad = sum(len(series.steps) - len(series.finite()) for series in self.series)
        return chips + (f'<span class="chip bad">{bad} values not finite</span>' if bad else "")

    def _spoken(self, curves: list[tuple[Series, list[Point]]]) -> str:
        parts = []
        for series, _ in curves:
            pairs = series.finite()
            values = [value for _, value in pairs]
            parts.append(
                f"{series.name} from {self.form(values[0])} at {self._at(pairs[0][0])} to {self.form(values[-1])} "
                f"at {self._at(pairs[-1][0])}, lowest {self.form(min(values))}, highest {self.form(max(values))}"
            )
        return f"{self.title}: {'; '.join(parts)}"

    def _at(self, step: float) -> str:
        return f"{self.step_name} {self.step_form(step)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """Steps and values to shares of the box."""

    first: float
    last: float
    low: float
    high: float
    y_ticks: list[float]
    x_ticks: list[float]

    @staticmethod
    def around(curves: list[tuple[Series, list[Point]]], from_zero: bool) -> _Axes:
        points = [point for _, found in curves for point in found]
        baselines = [series.baseline for series, _ in curves if series.baseline is not None]
        low, high = min(p.low for p in points), max(p.high for p in points)
        low, high = min([low, *baselines]), max([high, *baselines])
        low = min(low, 0.0) if from_zero else low
        pad = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
        low, high = (low if from_zero and low == 0 else low - pad), high + pad
        first, last = min(p.step for p in points), max(p.step for p in points)
        return _Axes(
            first=first, last=last, low=low, high=high, y_ticks=ticks(low, high, 4),
            x_ticks=[tick for tick in ticks(first, last, 5) if tick == round(tick)] or [first],
        )  # fmt: skip

    def x(self, step: float) -> float:
        return (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5

    def y(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def condense(pairs: Sequence[tuple[float, float]], max_points: int = _MAX_POINTS) -> list[Point]:
    """At most `max_points` stretches of equally many values, in order."""
    length = max(1, -(-len(pairs) // max_points))
    found = []
    for start in range(0, len(pairs), length):
        steps, values = zip(*pairs[start : start + length], strict=True)
        found.append(Point(sum(steps) / len(steps), sum(values) / len(values), min(values), max(values)))
    return found


def ticks(low: float, high: float, num: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) inside [low, high], about `num` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.7)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is short."""
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.3g} %"


def _shapes(place: int, series: Series, points: list[Point], axes: _Axes) -> str:
    colour = f'class="c{place % 6}"'
    line = " ".join(_at(axes, p.step, p.mean) for p in points)
    out = ""
    if any(p.high > p.low for p in points):
        band = [_at(axes, p.step, p.high) for p in points] + [_at(axes, p.step, p.low) for p in reversed(points)]
        out += f'<polygon {colour} points="{" ".join(band)}"/>'
    if series.baseline is not None:
        out += f'<line class="base c{place % 6}" {_across(axes.y(series.baseline))}/>'
    if len(points) <= 24:  # a path of no length with round ends is a dot that does not stretch
        out += f'<path {colour} d="{"".join(f"M{_at(axes, p.step, p.mean)}h0" for p in points)}" stroke-width="7"/>'
    return out + f'<polyline {colour} points="{line}"/>'


def _marker(axes: _Axes, step: float, label: str) -> str:
    x = _WIDTH * axes.x(min(max(step, axes.first), axes.last))
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT:g}"><title>{escape(label)}</title></line>'


def _across(share_of_height: float) -> str:
    y = _HEIGHT * (1 - share_of_height)
    return f'x1="0" x2="{_WIDTH:g}" y1="{y:.1f}" y2="{y:.1f}"'


def _at(axes: _Axes, step: float, value: float) -> str:
    return f"{_WIDTH * axes.x(step):.1f},{_HEIGHT * (1 - axes.y(value)):.1f}"
