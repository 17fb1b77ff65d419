"""The statistics of a dataset for a terminal, and as one HTML page with pictures that needs no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from vlm_train.cli import sheets
from vlm_train.cli.tables import table
from vlm_train.data.stats import Distribution, Example, Statistics
from vlm_train.data.writer import write_atomically
from vlm_train.engine import report_page
from vlm_train.engine.charts import number, share

_SHARES = (0, 5, 50, 95, 100)


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
        sheets.STYLE,
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
    told = f"median {number(each.percentiles[50])}, 95 % below {number(each.percentiles[95])}"
    return sheets.histogram(each.name, each.edges, each.counts, unit=each.unit, told=told)


def _figure(example: Example) -> str:
    return (
        f'<figure><div class="frame">{sheets.picture(example)}</div><p>{escape(example.caption)}</p>'
        f"{sheets.place_of(example)}</figure>"
    )
