"""What a calibration measured, for a terminal and as a part of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from vlm_train.cli import sheets
from vlm_train.cli.tables import table
from vlm_train.curation.calibration import CONTROL, COPIES
from vlm_train.curation.calibration_curves import TRUE_COPIES, precision, recall
from vlm_train.engine import report_page
from vlm_train.engine.charts import Chart, Series, share

Content = Mapping[str, Any]
"""Of calibration.json."""

Pair = Callable[[int, int, str], str]
"""(row, row, what is said of them) to a figure of both pictures."""

_EXPLAINED = (
    "Each kind of copy was planted for itself beside the same pictures of your own. In a cell: recall (precision). "
    "Found is a copy that is taken for a copy of its own picture; wrong is one that is taken for a copy of another, "
    "while its own is none of that. A mirrored picture is another one, and the control: what is found of these is no "
    "merit. Pictures of your own that are taken for copies of each other count as neither, for nobody has said whether "
    "they are. Beside the names of curves: their values at the coarsest threshold; dashed line: the suggestion."
)
_OWN = (
    '<p class="note">Pairs of your own pictures that are taken for copies of each other, some of each threshold at '
    "which they are found first, the finest first. Where these are no copies, a threshold is too coarse for your data, "
    "whatever the planted copies say.</p>"
)


def lines(content: Content) -> list[str]:
    """For a terminal: a table for each rule, and what it suggests."""
    text = [f"{content['num_planted']:,} of {content['num_own']:,} pictures were copied, by each kind once"]
    if content["num_unreadable"]:
        text.append(f"{content['num_unreadable']:,} that were drawn cannot be read")
    for rule in content["rules"]:
        header, rows = _cells(rule, content)
        text += ["", f"{rule['rule']}: recall (precision) by {rule['setting']}", *table(header, rows)]
        text.append(_advice(rule, content))
    return text


def section(content: Content, pair: Pair | None) -> str:
    """The part of a page. `pair`: how pictures are shown; None where they are those of other data."""
    inside = [_of_rule(rule, content, pair) for rule in content["rules"]]
    told = (
        f"{content['num_planted']:,} of {content['num_own']:,} pictures were copied, by each kind once; seed "
        f"{content['seed']}. "
        + (f"{content['num_unreadable']:,} could not be read. " * bool(content["num_unreadable"]))
    )
    return report_page.section("Calibration", f'<p class="note">{told}{escape(_EXPLAINED)}</p>', *inside)


def _of_rule(rule: Content, content: Content, pair: Pair | None) -> str:
    header, rows = _cells(rule, content)
    settings = ", ".join(f"{name} {value}" for name, value in rule["settings"].items())
    advice = report_page.table(
        f"{rule['rule']}: recall (precision) by {rule['setting']}", header, rows,
        f"{_advice(rule, content)}. Other settings: {settings or 'none'}.",
    )  # fmt: skip
    pairs = [] if pair is None else [pair(each["row"], each["like"], _told(rule, each)) for each in rule["own_pairs"]]
    strip = sheets.strip(f"Found in your own data by {rule['rule']}", pairs, above=_OWN) if pairs else ""
    return f'<div class="charts">{_charts(rule, content)}</div>{advice}{strip}'


def _told(rule: Content, pair: Content) -> str:
    value = "" if pair["value"] is None else f", value {pair['value']:.4g}"
    return f"from {rule['setting']} {pair['threshold']:g} on{value}"


def _charts(rule: Content, content: Content) -> str:
    points = rule["points"]
    names = [f"{point['threshold']:g}" for point in points]
    places = list(range(len(points)))
    marks = [(float(place), f"suggested: {names[place]}") for place in places
             if points[place]["threshold"] == rule["suggested"]]  # fmt: skip
    found = [
        Series(name=kind, steps=places, values=[recall(point, content["num_planted"], (kind,)) for point in points])
        for kind in COPIES
    ]
    wrong = [
        Series(name="precision of all kinds", steps=places, values=[precision(point) for point in points],
               baseline=content["precision"]),
        Series(name="own pictures that would be dropped", steps=places,
               values=[point["num_own_dropped"] / max(1, content["num_own"]) for point in points]),
    ]  # fmt: skip
    return "".join(
        Chart(title=f"{rule['rule']}: {title} by {rule['setting']}", series=series, markers=marks, form=share,
              from_zero=True, step_name=rule["setting"], step_form=lambda place: names[round(place)]).html()
        for title, series in (("recall", found), ("what it costs", wrong))
    )  # fmt: skip


def _cells(rule: Content, content: Content) -> tuple[list[str], list[list[str]]]:
    header = [rule["setting"], "all copies", *[f"{kind} (control)" if kind == CONTROL else kind for kind in COPIES],
              "own dropped"]  # fmt: skip
    return header, [_row(point, content) for point in rule["points"]]


def _row(point: Content, content: Content) -> list[str]:
    shares = [_cell(point, content, kinds) for kinds in (TRUE_COPIES, *[(kind,) for kind in COPIES])]
    return [f"{point['threshold']:g}", *shares, f"{point['num_own_dropped']:,}"]


def _cell(point: Content, content: Content, kinds: tuple[str, ...]) -> str:
    found, right = share(recall(point, content["num_planted"], kinds)), precision(point, kinds)
    return found if kinds == (CONTROL,) else f"{found} ({'-' if right is None else share(right)})"


def _advice(rule: Content, content: Content) -> str:
    target = share(content["precision"])
    if rule["suggested"] is None:
        return f"no {rule['setting']} reaches a precision of {target}: none is suggested"
    told = f"suggested: {rule['setting']} {rule['suggested']:g}"
    told += f", the finest of those of largest recall at a precision of {target} or more"
    own = next(point["num_own_dropped"] for point in rule["points"] if point["threshold"] == rule["suggested"])
    return told + (f"; {own:,} of {content['num_own']:,} own pictures would go too: look at these first" if own else "")
