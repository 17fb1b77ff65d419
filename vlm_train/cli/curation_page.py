"""What a chain of curation did, as one HTML page with pictures that needs no network, of a few megabytes at most."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from vlm_train.cli import calibration_page, sheets
from vlm_train.curation.report import Cluster, Report, Seen, Shown
from vlm_train.curation.report_fate import NOTHING, Rule
from vlm_train.curation.report_flags import Flags
from vlm_train.data.stats import Example
from vlm_train.engine import report_page
from vlm_train.engine.charts import number, share

MAX_BYTES = 6_000_000
"""A page is no larger; pictures may take `MAX_PICTURES` of it, and what is cut off below bounds the rest."""

MAX_PICTURES = 4_500_000

_QUALITY = 72
_MAX_CAPTION, _MAX_NAME, _MAX_VALUE, _MAX_TEXT, _MAX_ROWS, _MAX_STEPS = 200, 80, 200, 20_000, 100, 20
_LEFT_OUT = '<span class="note">left out: the page is full</span>'
STYLE = sheets.STYLE + (
    "<style>.fall{display:grid;gap:8px}"
    ".fall div{display:grid;grid-template-columns:minmax(90px,220px) 1fr 90px;gap:4px 12px;align-items:center}"
    "figure+.strip{margin-top:12px}"
    ".fall span{overflow-wrap:anywhere}.fall b{text-align:right;font-variant-numeric:tabular-nums}"
    ".fall em{display:flex;height:16px;background:var(--bg);border-radius:3px;overflow:hidden}"
    ".fall i{background:var(--c0)}.fall i.gone{background:var(--c1)}.card+.charts,.charts+.card,.card+.card"
    "{margin-top:16px}@media(max-width:520px){.fall div{grid-template-columns:1fr auto}"
    ".fall em{grid-column:1/-1;grid-row:2}}</style>"
)
_CHAINS = (
    "A step looks only at what the steps before it keep, so how many of its rows another step would have dropped too "
    "is not known from this folder. What is known: rows that went for another row, which went itself by the step on "
    "the right. Nothing of their kind may be left."
)
_BORDER = (
    "With a green frame: kept samples whose value comes nearest to what the rule dropped. They are shown where the "
    "value is a number of the manifest; of other rules a folder tells the values of dropped samples alone."
)


class Pictures:
    """The pictures of a page: each as often as it is shown, until they take `MAX_PICTURES` bytes together."""

    def __init__(self, examples: Mapping[int, Example]) -> None:
        self.examples, self.num_bytes = examples, 0

    def frame(self, row: int) -> str:
        """The picture of a row in its frame."""
        inside = sheets.picture(replace(self.examples[row], caption=self.caption(row)), quality=_QUALITY)
        inside = inside if self.num_bytes + len(inside) <= MAX_PICTURES else _LEFT_OUT
        self.num_bytes += len(inside)
        return f'<div class="frame">{inside}</div>'

    def caption(self, row: int) -> str:
        """The caption of a row, cut where it is long."""
        return cut(self.examples[row].caption, _MAX_CAPTION)

    def one(self, row: int, tag: str, kind: str) -> str:
        """A figure of one row."""
        example = self.examples[row]
        place = sheets.place_of(replace(example, key=cut(example.key, _MAX_NAME)))
        return (
            f'<figure class="{kind}"><div class="tag">{escape(tag)}</div>{self.frame(row)}'
            f"<p>{escape(self.caption(row))}</p>{place}</figure>"
        )

    def pair(self, row: int, like: int, tag: str) -> str:
        """A figure of a row and of the one that it is taken for a copy of."""
        captions = f"{self.caption(row)} | {self.caption(like)}"
        return (
            f'<figure class="pair"><div class="tag">{escape(tag)}</div>{self.frame(row)}{self.frame(like)}'
            f"<p>{escape(captions)}</p>{sheets.place_of(self.examples[row])}</figure>"
        )


def rows_shown(report: Report, calibration: Mapping[str, Any] | None) -> list[int]:
    """All rows whose pictures the page shows, ascending."""
    rows = {each for cluster in report.clusters for each in (cluster.row, *(shown.row for shown in cluster.members))}
    for seen in report.seen:
        rows |= {each for shown in seen.strip for each in (shown.row, shown.like)}
        if seen.borders is not None:
            rows |= {row for row, _ in (*seen.borders.below, *seen.borders.above)}
    return sorted((rows | rows_of(calibration or {"rules": []})) - {NOTHING})


def rows_of(calibration: Mapping[str, Any]) -> set[int]:
    """The rows of the pairs that a calibration shows."""
    return {pair[name] for rule in calibration["rules"] for pair in rule["own_pairs"] for name in ("row", "like")}


def page(
    title: str,
    report: Report,
    pictures: Pictures,
    *,
    commands: Sequence[str],
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """The document. `commands`: with which to repeat it; `calibration`: of calibration.json, where there is one."""
    clusters = "".join(_cluster(cluster, pictures) for cluster in report.clusters)
    rules = "".join(_seen(seen, pictures) for seen in report.seen)
    body = [
        STYLE,
        report_page.section("What each rule removed", _waterfall(report), _table(report)),
        report_page.section("Largest clusters", clusters),
        report_page.section("What each rule saw", f'<p class="note">{escape(_BORDER)}</p>' if rules else "", rules),
        report_page.section("Scores that steps wrote down", _scores(report)),
        report_page.section("Kept against dropped", _comparisons(report)),
        report_page.section("Overlaps", _chains(report), _flags(report.measures.flags)),
        report_page.section("Shards that lost most", _shards(report)),
        _calibration(calibration, report, pictures),
        report_page.section("Provenance", *_provenance(report, commands)),
    ]
    footer = "Samples are drawn by their uids: the same folder and the same data give the same page, byte for byte."
    return report_page.page(title, _header(title, report), [part for part in body if part], footer)


def cut(text: str, length: int) -> str:
    """The text, or its beginning with an ellipsis."""
    return text if len(text) <= length else text[:length] + "…"


def _header(title: str, report: Report) -> str:
    begun, kept = report.fate.num_begun(), int(report.fate.is_kept.sum())
    figures = [
        ("samples are kept", f"{kept:,}"),
        ("of those begun with", share(kept / max(1, begun))),
        ("were dropped", f"{begun - kept:,}"),
        ("samples in the data", f"{report.num_samples:,}"),
        ("steps" if len(report.fate.steps) > 1 else "step", f"{len(report.fate.steps):,}"),
    ]
    return f'<div class="brand">vlm-train data report</div><h1>{escape(title)}</h1>{report_page.tiles(figures)}'


def _name(rule: Rule) -> str:
    return cut(rule.step if rule.name == rule.step else f"{rule.step}: {rule.name}", _MAX_NAME)


def _waterfall(report: Report) -> str:
    """Bars of what is left, and of what goes, rule after rule."""
    begun, left = report.fate.num_begun(), report.fate.num_begun()
    bars = []
    for rule in report.fate.rules[:_MAX_ROWS]:
        left -= rule.num_dropped
        widths = (100 * part / max(1, begun) for part in (left, rule.num_dropped))
        bar = '<em><i style="width:{:.3f}%"></i><i class="gone" style="width:{:.3f}%"></i></em>'.format(*widths)
        bars.append(f"<div><span>{escape(_name(rule))}</span>{bar}<b>-{rule.num_dropped:,}</b></div>")
    return f'<div class="card fall" aria-hidden="true">{"".join(bars)}</div>' if bars else ""


def _table(report: Report) -> str:
    begun, left, rows = report.fate.num_begun(), report.fate.num_begun(), []
    for rule in report.fate.rules:
        left -= rule.num_dropped
        shares = (share(rule.num_dropped / max(1, before)) for before in (rule.num_before, begun))
        limit = "" if rule.limit is None else f"{rule.limit:g}"
        rows.append([_name(rule), f"{rule.num_dropped:,}", f"{rule.num_before:,}", *shares, f"{left:,}", limit])
    idle = [str(step["step"]) for step in report.fate.steps if not step["num_dropped"]]
    note = f"Dropped nothing: {cut(', '.join(idle), _MAX_VALUE)}. " if idle else ""
    note += f"{report.num_samples - begun:,} samples were not begun with. " if begun < report.num_samples else ""
    note += f"{len(rows) - _MAX_ROWS:,} further rules. " if len(rows) > _MAX_ROWS else ""
    header = ["rule", "dropped", "before the step", "of these", "of all begun with", "left", "limit"]
    return report_page.table("Dropped by each rule", header, rows[:_MAX_ROWS], note)


def _cluster(cluster: Cluster, pictures: Pictures) -> str:
    """The sample that stays, and some of those that went for it."""
    state = "kept" if cluster.rule is None else f"gone itself later by {_name(cluster.rule)}"
    shown = [pictures.one(cluster.row, state, "kept" if cluster.rule is None else "gone")]
    shown += [pictures.one(each.row, _told(each, _name(each.rule)), "gone") for each in cluster.members if each.rule]
    few = f", {len(cluster.members)} of them, evenly by value" if cluster.size > len(cluster.members) else ""
    title = f"{cluster.size:,} went for one sample{few}"
    return sheets.strip(title, shown)


def _told(shown: Shown, by: str) -> str:
    return by if math.isnan(shown.value) else f"{by} {shown.value:.4g}"


def _seen(seen: Seen, pictures: Pictures) -> str:
    """The values that a rule dropped, and samples of these in their order, with the kept ones around them."""
    rule, chart = seen.rule, ""
    if seen.values is not None:
        told = f"median {number(seen.values.percentiles[50])} of {rule.num_dropped:,} dropped"
        mark = None if rule.limit is None else (f"limit {rule.limit:g}", rule.limit)
        told += "" if rule.limit is None else f"; dashed line: {rule.name} {rule.limit:g}"
        chart = sheets.histogram(_name(rule), seen.values.edges, seen.values.counts, told=told, mark=mark)
    shown = [
        pictures.one(each.row, _told(each, "dropped"), "gone") if each.like == NOTHING
        else pictures.pair(each.row, each.like, f"{_told(each, 'dropped')} | for this")
        for each in seen.strip
    ]  # fmt: skip
    if seen.borders is not None:
        around = [
            [pictures.one(row, f"kept: {seen.borders.measure} {value:.4g}", "kept") for row, value in rows]
            for rows in (reversed(seen.borders.below), seen.borders.above)
        ]
        shown = [*around[0], *shown, *around[1]]
    title = f"{_name(rule)}: {rule.num_dropped:,} dropped, from the lowest value to the highest"
    title = title if seen.values is not None else f"{_name(rule)}: {rule.num_dropped:,} dropped"
    return sheets.strip(title, shown, above=chart)


def _scores(report: Report) -> str:
    found = [sheets.histogram(cut(each.name, _MAX_NAME), each.edges, each.counts) for each in report.facts[:_MAX_STEPS]]
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def _comparisons(report: Report) -> str:
    figures = [
        sheets.comparison(each.name, each.edges.tolist(), [("kept", each.kept.tolist()),
                                                          ("dropped", each.dropped.tolist())])
        for each in report.measures.comparisons
    ]  # fmt: skip
    note = "Each group in shares of its own; beside its name, how many of it have the number at all."
    return f'<div class="charts">{"".join(figures)}</div><p class="note">{note}</p>' if figures else ""


def _chains(report: Report) -> str:
    rows = [
        [cut(first, _MAX_NAME), f"{count:,}", cut(second, _MAX_NAME)]
        for (first, second), count in list(report.chains.items())[:_MAX_ROWS]
    ]
    note = _CHAINS if rows else f"{_CHAINS} There are no such rows here."
    return report_page.table("Gone for a row that is gone", ["dropped by", "rows", "for a row dropped by"], rows, note)


def _flags(flags: Flags) -> str:
    if not flags.flags:
        return ""
    names = [cut(flag.name, _MAX_NAME) for flag in flags.flags]
    rows = [
        [name, f"{both[place]:,}", f"{dropped:,}", share(dropped / max(1, both[place])), *(f"{n:,}" for n in both)]
        for place, (name, both, dropped) in enumerate(zip(names, flags.together, flags.dropped, strict=True))
    ]
    note = "What the manifest says with yes or no, or in a few words: how many samples have one, and two at a time."
    header = ["flag", "samples", "of these dropped", "share", *names]
    return report_page.table("Flags together", header, rows, note)


def _shards(report: Report) -> str:
    rows = [
        [cut(name, _MAX_NAME), share(dropped / size), f"{dropped:,}", f"{size:,}"]
        for name, size, dropped in report.shards
        if dropped
    ]
    header = ["shard", "share dropped", "dropped", "samples"]
    return report_page.table("By shard", header, rows) if len(report.shards) > 1 and rows else ""


def _calibration(content: Mapping[str, Any] | None, report: Report, pictures: Pictures) -> str:
    if content is None:
        return ""
    return calibration_page.section(content, pictures.pair if content["manifest"] == report.manifest else None)


def _provenance(report: Report, commands: Sequence[str]) -> Iterable[str]:
    facts = [
        ("Fingerprint of the data", report.manifest),
        ("Fingerprint of the selection", report.fate.fingerprint),
        ("Began with the selection", str(report.fate.provenance.get("among") or "")),
        *[("Again" if place else "This page", cut(command, 1000)) for place, command in enumerate(commands)],
    ]
    yield report_page.facts(facts)
    steps = report.fate.steps
    for step in steps[:_MAX_STEPS]:
        rows = [[name, cut(_plain(value), _MAX_VALUE)] for name, value in step["settings"].items()]
        rows += [
            [f"found: {name}", cut(_plain(value), _MAX_VALUE)]
            for name, value in step.get("facts", {}).items()
            if not isinstance(value, Mapping)
        ]
        yield report_page.table(cut(str(step["step"]), _MAX_NAME), ["setting", "value"], rows[:_MAX_ROWS])
    text = json.dumps({**report.fate.provenance, "steps": steps}, indent=1, sort_keys=True, ensure_ascii=False)
    yield report_page.folded("provenance.json", cut(text, _MAX_TEXT))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
