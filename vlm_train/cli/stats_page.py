"""The statistics of a dataset for a terminal, and as one HTML page with pictures that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

import cv2

from vlm_train.cli.tables import table
from vlm_train.data.stats import Distribution, Example, Statistics
from vlm_train.data.writer import write_atomically
from vlm_train.engine import report_page
from vlm_train.engine.charts import number, share

_SHARES = (0, 5, 50, 95, 100)
_STYLE = (
    "<style>.bars{display:flex;align-items:flex-end;gap:1px;height:120px;margin:10px 0 2px}"
    ".bars i{flex:1;background:var(--c0);min-height:1px}.bars i.none{background:var(--line)}"
    ".ends{display:flex;justify-content:space-between;color:var(--muted);font-size:12px}"
    ".sheet{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}"
    ".sheet figure{padding:10px}.sheet .frame{height:150px;display:flex;align-items:center;justify-content:center}"
    ".sheet img{max-width:100%;max-height:150px;border-radius:4px}"
    ".sheet p{margin:8px 0 0;font-size:12px;line-height:1.35;overflow:hidden;overflow-wrap:anywhere;"
    "display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical}.sheet small{color:var(--muted)}</style>"
)


def lines(found: Statistics) -> list[str]:
    """For a terminal."""
    rows = [
        [f"{each.name}{f' ({each.unit})' if each.unit else ''}", *(number(each.percentiles[at]) for at in _SHARES)]
        for each in found.distributions
    ]
    text = [f"{value} {name}" for name, value in _figures(found)]
    text += ["", *table(["", "min", "5 %", "median", "95 %", "max"], rows), ""]
    text += [
        f"{name}: {', '.join(f'{key} {count}' for key, count in counts.items())}" for name, counts in _counts(found)
    ]
    return text


def write_page(path: Path, title: str, found: Statistics) -> None:
    """The page: figures, histograms, what was left out, examples."""
    body = [
        _STYLE,
        report_page.tiles(_figures(found)),
        report_page.section("Sizes", f'<div class="charts">{"".join(map(_histogram, found.distributions))}</div>'),
        report_page.section("Counts", f'<div class="tables">{"".join(_tables(found))}</div>'),
        report_page.section("Examples", f'<div class="sheet">{"".join(map(_figure, found.examples))}</div>'),
    ]
    header = f'<div class="brand">vlm-train data stats</div><h1>{escape(title)}</h1>'
    footer = f'<p class="note">{found.num_read} samples, evenly spaced over the shards, were read for the examples.</p>'
    write_atomically(path, report_page.page(title, header, body, footer))


def _figures(found: Statistics) -> list[tuple[str, str]]:
    return [
        ("samples", f"{found.num_samples:,}"),
        ("shards", f"{found.num_shards:,}"),
        ("GB", f"{found.num_bytes / 1e9:.2f}"),
        ("repeat another sample", f"{found.num_samples - found.num_distinct:,}"),
        ("captions are distinct", f"{found.num_distinct_captions:,}"),
        ("have a label", f"{found.num_labelled:,}"),
        ("left out by indexing", share(found.error_rate)),
        ("of the examples do not decode", share(found.num_unreadable / max(1, found.num_read))),
    ]


def _counts(found: Statistics) -> list[tuple[str, dict[str, int]]]:
    named = [("formats", found.formats), ("left out", found.left_out), ("no part of a sample", found.ignored)]
    return [(name, counts) for name, counts in named if counts]


def _tables(found: Statistics) -> Iterable[str]:
    for name, counts in _counts(found):
        yield report_page.table(name.capitalize(), ["", "number"], [[key, f"{n:,}"] for key, n in counts.items()])


def _histogram(each: Distribution) -> str:
    highest = max(each.counts)
    bars = "".join(
        f'<i{"" if count else " class=none"} style="height:{100 * count / highest:.1f}%" '
        f'title="{number(low)} to {number(high)}: {count:,}"></i>'
        for count, low, high in zip(each.counts, each.edges, each.edges[1:], strict=False)
    )
    facts = f"median {number(each.percentiles[50])}, 95 % below {number(each.percentiles[95])}"
    unit = f" <span>{escape(each.unit)}</span>" if each.unit else ""
    return (
        f'<figure><figcaption><b>{escape(each.name)}</b>{unit}<span class="note">{facts}</span></figcaption>'
        f'<div class="bars">{bars}</div><div class="ends"><span>{number(each.edges[0])}</span>'
        f"<span>{number(each.edges[-1])}</span></div></figure>"
    )


def _figure(example: Example) -> str:
    if example.pixels is None:
        inside = f'<span class="bad">{escape(example.reason)}</span>'
    else:
        _, content = cv2.imencode(
            ".jpg", cv2.cvtColor(example.pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85]
        )
        data = base64.b64encode(content.tobytes()).decode()
        inside = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(example.caption)}">'
    size = f"{example.width} x {example.height}" if example.width else ""
    return (
        f'<figure><div class="frame">{inside}</div><p>{escape(example.caption)}</p>'
        f"<small>{escape(example.shard)} {escape(example.key)} {size}</small></figure>"
    )
