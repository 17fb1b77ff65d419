"""Pieces of pages about data: histograms, and samples to look at."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from html import escape

import cv2

from vlm_train.data.stats import Example
from vlm_train.engine.charts import number

STYLE = (
    "<style>h3{font-size:15px;margin:22px 0 8px;overflow-wrap:anywhere}"
    ".bars{display:flex;align-items:flex-end;gap:1px;height:120px;margin:10px 0 2px;position:relative}"
    ".bars i{flex:1;background:var(--c0);min-height:1px}.bars i.none{background:var(--line)}"
    ".bars i.c1{background:var(--c1);margin-right:1px}.bars i.c0{margin-left:1px}"
    ".bars u{position:absolute;top:-4px;bottom:0;border-left:2px dashed var(--ink)}"
    ".ends{display:flex;justify-content:space-between;color:var(--muted);font-size:12px}"
    ".sheet{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}"
    ".note+.charts,.note+.strip{margin-top:12px}"
    ".strip{display:flex;gap:12px;overflow-x:auto;padding-bottom:6px}.strip figure{flex:0 0 auto;width:160px}"
    ".strip figure.pair{width:296px}.pair .frame{display:inline-flex;width:50%;vertical-align:top}"
    ".sheet figure,.strip figure{padding:10px}"
    ".sheet .frame,.strip .frame{height:150px;display:flex;align-items:center;justify-content:center}"
    ".strip .frame{height:124px}.strip .pair .frame{display:inline-flex;padding:0 2px}"
    ".sheet img,.strip img{max-width:100%;max-height:150px;border-radius:4px}.strip img{max-height:124px}"
    ".strip figure.kept{border-color:var(--good);border-width:2px;padding:9px}"
    ".sheet p,.strip p{margin:8px 0 0;font-size:12px;line-height:1.35;overflow:hidden;overflow-wrap:anywhere;"
    "display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical}"
    ".strip .tag{font-size:12px;font-weight:600;margin-bottom:6px;overflow-wrap:anywhere}"
    ".sheet small,.strip small{color:var(--muted);overflow-wrap:anywhere}</style>"
)


def histogram(
    name: str,
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    unit: str = "",
    told: str = "",
    mark: tuple[str, float] | None = None,
) -> str:
    """A figure of bars. `edges` [n + 1], `counts` [n]; `told`: what stands beside the name; `mark`: (what it is, where)
    of a vertical line, which lies at the edge of the figure where it lies beyond."""
    highest = max([*counts, 1])
    bars = "".join(
        f'<i{"" if count else " class=none"} style="height:{100 * count / highest:.1f}%" '
        f'title="{number(low)} to {number(high)}: {count:,}"></i>'
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    )
    line = "" if mark is None else f'<u style="left:{_place(edges, mark[1]):.2f}%" title="{escape(mark[0])}"></u>'
    return _figure_of_bars(name, unit, f'<span class="note">{escape(told)}</span>', bars + line, edges)


def comparison(name: str, edges: Sequence[float], groups: Sequence[tuple[str, Sequence[int]]]) -> str:
    """A figure of bars of two groups, side by side, each in shares of its own."""
    shares = [(group, [count / max(1, sum(counts)) for count in counts]) for group, counts in groups]
    highest = max(max(each) for _, each in shares) or 1
    bars = "".join(
        f'<i class="{f"c{place}" if each[bin_] else "none"}" style="height:{100 * each[bin_] / highest:.1f}%" '
        f'title="{number(edges[bin_])} to {number(edges[bin_ + 1])}: {100 * each[bin_]:.1f} % of {escape(group)}"></i>'
        for bin_ in range(len(edges) - 1)
        for place, (group, each) in enumerate(shares)
    )
    chips = "".join(
        f'<span class="chip c{place}">{escape(group)} <b>{sum(counts):,}</b></span>'
        for place, (group, counts) in enumerate(groups)
    )
    return _figure_of_bars(name, "", chips, bars, edges)


def _figure_of_bars(name: str, unit: str, beside: str, bars: str, edges: Sequence[float]) -> str:
    told = f" <span>{escape(unit)}</span>" if unit else ""
    return (
        f"<figure><figcaption><b>{escape(name)}</b>{told}{beside}</figcaption>"
        f'<div class="bars">{bars}</div><div class="ends"><span>{number(edges[0])}</span>'
        f"<span>{number(edges[-1])}</span></div></figure>"
    )


def _place(edges: Sequence[float], value: float) -> float:
    """Where a value lies between the first edge and the last, in per cent of bins that are drawn equally wide."""
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        if value < high:
            return 100 * (place + max(0.0, (value - low) / (high - low))) / (len(edges) - 1)
    return 100.0


def strip(title: str, figures: Sequence[str], *, above: str = "") -> str:
    """Figures in a row that scrolls, below their title and what stands `above` them."""
    box = f'<div class="strip" tabindex="0" role="region" aria-label="{escape(title)}">{"".join(figures)}</div>'
    return f"<h3>{escape(title)}</h3>{above}{box}"


def picture(example: Example, *, quality: int = 85) -> str:
    """The picture of a sample inside the document, or why there is none."""
    if example.pixels is None:
        return f'<span class="bad">{escape(example.reason)}</span>'
    bgr = cv2.cvtColor(example.pixels, cv2.COLOR_RGB2BGR)
    _, content = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    data = base64.b64encode(content.tobytes()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(example.caption)}">'


def place_of(example: Example) -> str:
    """Shard, key and size of a sample."""
    size = f" {example.width} x {example.height}" if example.width else ""
    return f"<small>{escape(f'{example.shard} {example.key}')}{size}</small>"
