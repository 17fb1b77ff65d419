"""One picture of a run for a terminal: plain lines of text, with colours where they are wanted."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from vlm_train.cli.terminal import CUT, Line, Terminal
from vlm_train.cli.watched import View
from vlm_train.engine.report_time import COLOURS, headline, spoken

CURVE_LINES = 8
NUM_EVENTS = 5
EVENT_LINES = 4
LEAST_DRAWN = 10
"""Columns below which neither the curve nor the bar is drawn."""
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character: [row from above][column]
_STATUS_COLOURS = {"running": "#15803d", "waiting": "#94a3b8", "finished": "#2f6fdb", "stopped": "#a16207",
                   "failed": "#c62828", "ended": "#c62828"}  # fmt: skip
_STATUS_WORDS = {
    "ended": "nobody trains it: it was killed, or its machine is gone",
    "waiting": "waits for its job to start",
}
_QUIET = ("environment", "checkpoint")  # events that come by themselves all the time


def frame(view: View, terminal: Terminal) -> list[str]:
    """What fits into the terminal."""
    width = terminal.width
    lines: list[Line] = [_title(view), *_gaps(view), _progress(view, width), ""]
    if view.metrics:
        lines += [*_curve([row["loss"] for row in view.metrics], width), "", _pace(view), ""]
    lines += _time(view, width, colour=terminal.colour)
    lines += _scores(view)
    lines += [_checkpoint(view), *_ranks(view), "", *_events(view, width)]
    return [terminal.shown(line) for line in lines][: max(terminal.height - 1, 1)]


def summary(view: View) -> str:
    """One line for a log."""
    parts = [f"{view.status} step {view.step}" + (f"/{view.num_steps}" if view.num_steps is not None else "")]
    parts += [f"loss {view.metrics[-1]['loss']:.4f}", f"{view.rate:.0f} samples/s"] if view.metrics else []
    parts += [f"eta {spoken(view.eta)}"] if view.eta is not None else []
    parts += [f"goodput {view.time.goodput:.0%}"] if view.time else []
    return ", ".join([*parts, *_gaps(view)])


def _title(view: View) -> Line:
    status = _STATUS_WORDS.get(view.status, view.status)
    silent = f", last record {spoken(view.silent)} ago" if view.silent is not None and view.status != "finished" else ""
    return [("●", _STATUS_COLOURS[view.status]), (f" {status}{silent}  {view.name}", "")]


def _gaps(view: View) -> Iterable[str]:
    """What of the run's files is not shown, for it cannot be read."""
    if view.config_error:
        yield f"config.yaml cannot be read: {view.config_error}"
    if view.num_bad:
        files = ", ".join(f"{num} of {name}" for name, num in view.num_bad.items())
        yield f"lines left out, for they are no records: {files}"


def _progress(view: View, width: int) -> str:
    if view.num_steps is None:
        return f"step {view.step:,}"
    share = min(max(view.step / view.num_steps, 0.0), 1.0)
    left = f", {spoken(view.eta)} left" if view.eta is not None else ""
    words = f"{share:.0%}  step {view.step:,} of {view.num_steps:,}{left}"
    size = width - len(words) - 1
    return f"{'█' * round(share * size)}{'░' * (size - round(share * size))} {words}" if size >= LEAST_DRAWN else words


def _curve(losses: Sequence[float], width: int) -> list[str]:
    """The loss over all steps, as a line of dots; a column shows the mean of the steps that fall into it."""
    label = 10
    last = f"loss {losses[-1]:.4f}" if abs(losses[-1]) < 1e6 else f"loss {losses[-1]:.4g}"
    if width - label < LEAST_DRAWN:
        return [last]
    columns = _columns([loss for loss in losses if math.isfinite(loss)], 2 * (width - label))
    if not columns:
        return ["loss: not a finite one yet"]
    low, high = min(columns), max(columns)
    rows = [round((high - value) / (high - low or 1.0) * (4 * CURVE_LINES - 1)) for value in columns]
    cells = [[0] * (width - label) for _ in range(CURVE_LINES)]
    for place, (row, before) in enumerate(zip(rows, rows[:1] + rows, strict=False)):
        for dot in range(min(row, before), max(row, before) + 1):
            cells[dot // 4][place // 2] |= _DOTS[dot % 4][place % 2]
    labels = [f"{high:.3g}", *[""] * (CURVE_LINES - 2), f"{low:.3g}"]
    drawn = ["".join(chr(0x2800 + dots) if dots else " " for dots in row) for row in cells]
    return [last, *(f"{text:>{label - 1}} {row}" for text, row in zip(labels, drawn, strict=True))]


def _columns(values: Sequence[float], num: int) -> list[float]:
    """`num` values for as many columns: means of equal parts, or points on the lines between fewer values."""
    if len(values) >= num:
        bounds = [place * len(values) // num for place in range(num + 1)]
        return [sum(values[first:last]) / (last - first) for first, last in pairwise(bounds)]
    columns = []
    for place in range(num if values else 0):
        first, part = divmod(place * (len(values) - 1) / max(num - 1, 1), 1.0)
        here, there = values[int(first)], values[min(int(first) + 1, len(values) - 1)]
        columns.append(here + part * (there - here))
    return columns


def _pace(view: View) -> str:
    row = view.metrics[-1]
    mfu = f"   mfu {row['mfu']:.0%}" if row.get("mfu") else ""
    return (
        f"{view.rate:,.0f} samples/s   lr {row['lr']:.2e}   gradient {row['grad_norm']:.2f}   "
        f"waiting for data {row['data_wait']:.0%}{mfu}"
    )


def _time(view: View, width: int, *, colour: bool) -> list[Line]:
    if view.time is None:
        return []
    shares = {name: share for name, share in view.time.shares().items() if share >= 0.005}
    names = [name for name in COLOURS if name in shares]
    legend = [f"{name.replace('_', ' ')} {shares[name]:.0%}" for name in names]
    lines: list[Line] = [headline(view.time)]
    if colour:  # without, nobody could tell the parts of the bar apart
        ends = [round(min(share, 1.0) * width) for share in accumulate(shares[name] for name in names)]
        sizes = [end - begin for begin, end in pairwise([0, *ends])]
        lines.append([("█" * size, COLOURS[name]) for name, size in zip(names, sizes, strict=True)])
    entries = [[("■ ", COLOURS[name])] * colour + [(text, "")] for name, text in zip(names, legend, strict=True)]
    return [*lines, *_filled(entries, width), ""]


def _filled(entries: Sequence[list[tuple[str, str]]], width: int) -> list[Line]:
    """Parts of lines one behind the other, as many on a line as fit."""
    lines: list[list[tuple[str, str]]] = [[]]
    for entry in entries:
        if lines[-1] and sum(len(text) for text, _ in [*lines[-1], *entry]) + 3 > width:
            lines.append([])
        lines[-1] += [("   ", ""), *entry] if lines[-1] else entry
    return list(lines)


def _scores(view: View) -> list[str]:
    lines = []
    for name, (step, found) in view.evals.items():
        if scores := [f"{score.name} {score.value:.1f}" for score in found[:4]]:
            lines.append(f"{name} after step {step:,}: {', '.join(scores)}")
    return [*lines, ""] if lines else []


def _checkpoint(view: View) -> str:
    if view.latest is None:
        return "no checkpoint yet"
    step, age = view.latest
    return f"checkpoint of step {step:,}, {spoken(age)} old"


def _ranks(view: View) -> Iterable[str]:
    now = time.monotonic()
    for beat in view.beats:
        at = f" in {beat.collective}" if beat.collective else ""
        step = f" of step {beat.step:,}" if beat.step else ""
        yield f"rank {beat.rank}: {beat.account.replace('_', ' ')}{step}{at}, for {spoken(now - beat.moved)}"


def _events(view: View, width: int) -> Iterable[str]:
    for event in [row for row in view.events if row["event"] not in _QUIET][-NUM_EVENTS:]:
        told = f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {event['event']:<12} "
        if not event["sentence"]:
            yield told + event["fields"]
            continue
        indent = " " * min(len(told), width // 3)
        yield from textwrap.wrap(
            told + event["sentence"], width, subsequent_indent=indent, max_lines=EVENT_LINES, placeholder=CUT
        )
