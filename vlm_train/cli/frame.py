"""One picture of a run for a terminal: plain lines of text, with colours where they are wanted."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

from vlm_train.cli.watched import View
from vlm_train.engine.report_time import COLOURS, headline, spoken
from vlm_train.engine.scores import scores_of

CURVE_LINES = 8
NUM_EVENTS = 5
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character: [row from above][column]
_STATUS_COLOURS = {"running": "#15803d", "finished": "#2f6fdb", "stopped": "#a16207", "ended": "#c62828"}
_QUIET = ("environment", "checkpoint")  # events that come by themselves all the time


def frame(view: View, width: int, height: int, *, colour: bool) -> list[str]:
    """At most `height` lines of at most `width` characters."""
    width = max(width, 40)
    lines = [_title(view, colour), _progress(view, width), ""]
    if view.metrics:
        lines += [*_curve([row["loss"] for row in view.metrics], width), "", _pace(view), ""]
    lines += _time(view, width, colour=colour)
    lines += _scores(view)
    lines += [_checkpoint(view), *_ranks(view), "", *_events(view, width)]
    return [line if "\x1b" in line else line[:width] for line in lines][: max(height - 1, 1)]


def summary(view: View) -> str:
    """One line for a log."""
    parts = [f"{view.status} step {view.step}/{view.num_steps}"]
    parts += [f"loss {view.metrics[-1]['loss']:.4f}", f"{view.rate:.0f} samples/s"] if view.metrics else []
    parts += [f"eta {spoken(view.eta)}"] if view.eta is not None else []
    parts += [f"goodput {view.time.goodput:.0%}"] if view.time else []
    return ", ".join(parts)


def _title(view: View, colour: bool) -> str:
    status = {"ended": "nobody trains it: it was killed, or its machine is gone"}.get(view.status, view.status)
    silent = f", last record {spoken(view.silent)} ago" if view.silent is not None and view.status != "finished" else ""
    dot = _painted("●", _STATUS_COLOURS[view.status]) if colour else "*"
    return f"{dot} {view.name}  {status}{silent}"


def _progress(view: View, width: int) -> str:
    share = min(view.step / view.num_steps, 1.0)
    left = f", {spoken(view.eta)} left" if view.eta is not None else ""
    words = f" {share:.0%}  step {view.step:,} of {view.num_steps:,}{left}"
    size = max(width - len(words), 10)
    return "█" * round(share * size) + "░" * (size - round(share * size)) + words


def _curve(losses: Sequence[float], width: int) -> list[str]:
    """The loss over all steps, as a line of dots; a column shows the mean of the steps that fall into it."""
    label = 10
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
    last = f"{losses[-1]:.4f}" if abs(losses[-1]) < 1e6 else f"{losses[-1]:.4g}"
    return [f"loss {last}", *(f"{text:>{label - 1}} {row}" for text, row in zip(labels, drawn, strict=True))]


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


def _time(view: View, width: int, *, colour: bool) -> list[str]:
    if view.time is None:
        return []
    shares = {name: share for name, share in view.time.shares().items() if share >= 0.005}
    names = [name for name in COLOURS if name in shares]
    legend = [f"{name.replace('_', ' ')} {shares[name]:.0%}" for name in names]
    lines = [headline(view.time)]
    if colour:
        blocks = {name: round(shares[name] * width) for name in names}
        lines.append("".join(_painted("█" * blocks[name], COLOURS[name]) for name in names))
        painted = [f"{_painted('■', COLOURS[name])} {text}" for name, text in zip(names, legend, strict=True)]
        return [*lines, *_wrapped(legend, width - 3, painted), ""]
    return [*lines, *_wrapped(legend, width, legend), ""]


def _wrapped(texts: Sequence[str], width: int, painted: Sequence[str]) -> list[str]:
    """Texts one behind the other, as many on a line as fit; `painted`: what is written for each."""
    lines: list[list[str]] = [[]]
    used = 0
    for text, shown in zip(texts, painted, strict=True):
        if used + len(text) + 5 > width and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(shown)
        used += len(text) + 5
    return ["   ".join(line) for line in lines]


def _scores(view: View) -> list[str]:
    lines = []
    for name, result in view.evals.items():
        scores = [f"{score.name} {score.value:.1f}" for score in scores_of(result)[:4]]
        if scores:
            lines.append(f"{name} after step {result['step']:,}: {', '.join(scores)}")
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
        fields = {key: value for key, value in event.items() if key not in ("event", "time", "ranks")}
        told = f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {event['event']:<12} "
        what = textwrap.wrap(fields["sentence"], width - len(told)) if "sentence" in fields else [json.dumps(fields)]
        yield told + what[0]
        yield from (" " * len(told) + line for line in what[1:])


def _painted(text: str, colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"\x1b[38;2;{red};{green};{blue}m{text}\x1b[0m"
