"""Where a run's time went, as a bar of the report and as lines of a terminal; from the ledger's files alone."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from vlm_train.engine import report_page as page
from vlm_train.engine.ledger import IDLE, Totals, lives_of, totals
from vlm_train.engine.rundir import RunDirectory

COLOURS = {
    "compute": "#2f6fdb", "optimizer": "#5b8def", "communication": "#8b3fc7", "host_to_device": "#0e7490",
    "data_wait": "#c2410c", "validation": "#15803d", "checkpoint": "#a16207", "overhead": "#6b7280",
    "startup": "#94a3b8", "compile": "#be185d", "replay": "#c62828", IDLE: "#d1d5db",
}  # fmt: skip
"""In the order in which they are shown: what is learned in first, what is lost last."""
SMALLEST = 0.0005
"""Shares below it are not listed."""


def time_section(run: RunDirectory) -> str:
    """The bar of rank 0 with its legend, and the accounts of every rank where there are several; empty for a run of
    before there was a ledger."""
    found = totals(lives_of(run.time_of(0)))
    if found is None:
        return ""
    shares = found.shares()
    parts = "".join(
        f'<span title="{name} {share:.1%}" style="width:{100 * share:.3f}%;background:{COLOURS[name]}"></span>'
        for name, share in _shown(shares)
    )
    legend = "".join(
        f'<span class="chip" style="white-space:nowrap"><span style="display:inline-block;width:10px;height:10px;'
        f'border-radius:2px;margin-right:5px;background:{COLOURS[name]}"></span>{escape(_word(name))} '
        f"<b>{share:.1%}</b> {escape(spoken(found.seconds[name]))}</span>"
        for name, share in _shown(shares)
    )
    bar = f'<div style="display:flex;height:26px;border-radius:6px;overflow:hidden">{parts}</div>'
    below = f'<div style="display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:10px">{legend}</div>'
    style = "<style>.timebar .chip::before{content:none}</style>"
    note = f'<p class="note">{escape(headline(found))}. Productive: compute, optimizer, communication.</p>'
    return f'{style}<div class="card timebar">{bar}{below}{note}</div>{_ranks(run, found)}'


def _ranks(run: RunDirectory, first: Totals) -> str:
    others = {path.stem.rsplit("-", 1)[-1]: totals(lives_of(path)) for path in run.path.glob("time-rank-*.jsonl")}
    if not others:
        return ""
    names = [name for name, _ in _shown(first.shares())]
    rows = [
        [f"rank {rank}", *(spoken(found.seconds[name]) for name in names)]
        for rank, found in [("0", first), *sorted(others.items(), key=lambda item: int(item[0]))]
        if found is not None
    ]
    note = "The rank that waits least in communication is the one that the others wait for."
    return f'<div style="margin-top:16px">{page.table("By rank", ["", *map(_word, names)], rows, note)}</div>'


def time_lines(run: RunDirectory) -> list[str]:
    """The accounts of rank 0 as a table; nothing for a run of before there was a ledger."""
    found = totals(lives_of(run.time_of(0)))
    if found is None:
        return []
    rows = [
        f"  {_word(name):15}{spoken(found.seconds[name]):>10}{share:8.1%}" for name, share in _shown(found.shares())
    ]
    return [f"  {headline(found)}", *rows]


def headline(found: Totals) -> str:
    """How long, in how many processes, and how much of it was productive."""
    starts = f" in {found.num_lives} starts" if found.num_lives > 1 else ""
    return f"time {spoken(found.wall)}{starts}, goodput {found.goodput:.1%}"


def spoken(seconds: float) -> str:
    """A span of time with one unit."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _shown(shares: dict[str, float]) -> Iterator[tuple[str, float]]:
    return ((name, shares[name]) for name in COLOURS if shares[name] >= SMALLEST)


def _word(name: str) -> str:
    return name.replace("_", " ")
