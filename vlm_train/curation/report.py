"""What a chain of curation did, as far as its folder and the manifest can tell: counts, overlaps, spreads, and which
samples to look at.

A step looks at what the steps before it keep, and a folder holds what each rule looked at of the rows that it dropped
alone. So it is not known here how many of a step's rows another step would have dropped too, nor what a rule saw of the
rows that it kept, but where that is a number of the manifest. What is drawn for pictures is drawn by uid, so it is the
same whatever the order of the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation.clusters import uid_words
from vlm_train.curation.report_fate import NOTHING, Fate, Rule, read_fate
from vlm_train.curation.report_measures import Borders, Measures, compare
from vlm_train.data.manifest import Manifest
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.stats import Distribution, Example, example_of

NUM_CLUSTERS, NUM_MEMBERS = 10, 7
NUM_STRIP, NUM_KEPT = 10, 4
NUM_SHARDS = 15
SIDE = 120
"""Pixels of the longer side of a picture that is shown."""

_MOST_RULES = 40  # with pictures and histograms; the table of steps has all
_READ = 16  # samples whose bytes are held at a time
_BARS = 64


@dataclass(frozen=True, slots=True)
class Shown:
    """A row to look at: `rule` by which it went, None where it is kept; `like`: the row for which it went, or -1."""

    row: int
    rule: Rule | None
    value: float
    like: int = NOTHING


@dataclass(frozen=True, slots=True, eq=False)
class Cluster:
    """A row, `size` rows that went for it, and some of these. `rule`: by which it went itself later, or None."""

    row: int
    size: int
    rule: Rule | None
    members: list[Shown]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a rule dropped: `values` where they differ; `strip`: some rows, by value; `borders`: the kept rows that come
    nearest to these, where the value is a measure of the manifest."""

    rule: Rule
    values: Distribution | None
    strip: list[Shown]
    borders: Borders | None


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """One that a step has written down: `edges` [n + 1], `counts` [n]."""

    name: str
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """All of it but the pictures. `chains`: by (step, step) how many rows that the first dropped went for a row that
    the second dropped; `shards`: (name, samples, dropped) of those that lost the largest share; `facts`: histograms
    of steps."""

    fate: Fate
    manifest: str
    num_samples: int
    clusters: list[Cluster]
    seen: list[Seen]
    measures: Measures
    chains: dict[tuple[str, str], int]
    shards: list[tuple[str, int, int]]
    facts: list[Histogram]


def examine(folder: Path, source: ShardSource) -> Report:
    """Looks at the folder of a chain. Memory: 30 bytes for each row of the manifest.

    Args:
        folder: of the selection.
        source: the shards that it was made for.

    Raises:
        ConfigError: a selection that no chain of steps made.
        DataError: the folder or the manifest is damaged, or they do not belong together.
    """
    manifest = source.manifest
    fate = read_fate(folder, manifest)
    measures = compare(manifest, fate, num_nearest=NUM_KEPT)
    return Report(
        fate=fate,
        manifest=manifest.fingerprint,
        num_samples=len(manifest),
        clusters=list(_clusters(fate, manifest)),
        seen=[_seen(fate, number, manifest, measures) for number in range(min(len(fate.rules), _MOST_RULES))],
        measures=measures,
        chains=_chains(fate),
        shards=_shards(fate, source),
        facts=[found for step in fate.steps for found in histograms(str(step["step"]), step.get("facts", {}))],
    )


def examples(source: ShardSource, rows: Iterable[int]) -> Iterator[Example]:
    """What is shown of some rows, in their order; also of those that cannot be read."""
    every = np.fromiter(rows, np.int64)
    for start in range(0, len(every), _READ):
        part = every[start : start + _READ]
        for row, sample in zip(part.tolist(), source.read(part), strict=True):
            yield example_of(source, row, sample, SIDE)


def histograms(name: str, facts: Any) -> Iterator[Histogram]:
    """Those in the facts of a step at any depth: {edges, counts}, or {low, high, counts} of equal bins."""
    if not isinstance(facts, Mapping):
        return
    counts, edges = facts.get("counts"), facts.get("edges")
    if isinstance(counts, list) and counts and all(isinstance(each, int | float) for each in counts):
        if edges is None and {"low", "high"} <= facts.keys():
            edges = np.linspace(facts["low"], facts["high"], len(counts) + 1).tolist()
        if isinstance(edges, list) and len(edges) == len(counts) + 1:
            yield _trimmed(name, edges, counts)
    for key, value in facts.items():
        yield from histograms(f"{name}: {key}", value)


def _trimmed(name: str, edges: list[float], counts: list[int]) -> Histogram:
    """Without empty bins at the ends; where many are left, neighbours are put together."""
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, len(counts))
    width = -(-(last - first) // _BARS)
    starts = range(first, last, width)
    return Histogram(name, [*[edges[start] for start in starts], edges[last]],
                     [sum(counts[start : min(start + width, last)]) for start in starts])  # fmt: skip


def _clusters(fate: Fate, manifest: Manifest) -> Iterator[Cluster]:
    """The largest, of equal ones those whose row has the lower uid."""
    gone = np.flatnonzero(fate.like != NOTHING)
    heads, sizes = np.unique(fate.like[gone], return_counts=True)
    if len(heads) > NUM_CLUSTERS:
        limit = np.partition(sizes, len(sizes) - NUM_CLUSTERS)[len(sizes) - NUM_CLUSTERS]
        heads, sizes = heads[sizes >= limit], sizes[sizes >= limit]
    order = np.lexsort((*uid_words(manifest.uids(heads)), -sizes))[:NUM_CLUSTERS]
    among = gone[np.isin(fate.like[gone], heads[order])]
    for head, size in zip(heads[order].tolist(), sizes[order].tolist(), strict=True):
        members = _evenly(fate, among[fate.like[among] == head], NUM_MEMBERS, manifest)
        yield Cluster(head, size, _rule_of(fate, head), members)


def _seen(fate: Fate, number: int, manifest: Manifest, measures: Measures) -> Seen:
    rows, rule = fate.dropped_by(number), fate.rules[number]
    values = fate.value[rows][np.isfinite(fate.value[rows])]
    spread = Distribution.of(rule.name, "", values) if len(values) and values.min() < values.max() else None
    return Seen(rule, spread, _evenly(fate, rows, NUM_STRIP, manifest), measures.borders.get(number))


def _evenly(fate: Fate, rows: NDArray[np.int64], num: int, manifest: Manifest) -> list[Shown]:
    """At most `num` of some dropped rows, by value from the lowest to the highest, those without one last."""
    values = np.nan_to_num(fate.value[rows], nan=np.inf)
    ordered, chosen = np.sort(values), []
    wanted = ordered[_places(ordered, num)]
    for value, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        equal = rows[values == value]
        chosen += equal[np.lexsort(uid_words(manifest.uids(equal)))[:count]].tolist()
    return [Shown(row, _rule_of(fate, row), float(fate.value[row]), int(fate.like[row])) for row in chosen]


def _places(ordered: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """At most `num` > 2 places among ascending values, of which there are some: half of them evenly over the values, so
    that rare ones are seen too, the others evenly over the places."""
    last, finite = len(ordered) - 1, ordered[np.isfinite(ordered)]
    over = np.linspace(finite[0], finite[-1], num // 2) if len(finite) else finite
    places = np.union1d(np.searchsorted(ordered, over), [last])
    spare = np.setdiff1d(np.linspace(0, last, min(4 * num, last + 1)).astype(np.int64), places)
    left = min(num - len(places), len(spare))
    return np.union1d(places, spare[np.linspace(0, len(spare) - 1, left).astype(np.int64)])


def _rule_of(fate: Fate, row: int) -> Rule | None:
    return None if fate.rule[row] == NOTHING else fate.rules[fate.rule[row]]


def _chains(fate: Fate) -> dict[tuple[str, str], int]:
    """Of rows that went for a row that went too."""
    gone = np.flatnonzero(fate.like != NOTHING)
    gone = gone[fate.rule[fate.like[gone]] != NOTHING]
    pairs = np.stack([fate.rule[gone], fate.rule[fate.like[gone]]], axis=1)
    found: dict[tuple[str, str], int] = {}
    for (first, second), count in zip(*np.unique(pairs, axis=0, return_counts=True), strict=True):
        steps = fate.rules[first].step, fate.rules[second].step
        found[steps] = found.get(steps, 0) + int(count)
    return found


def _shards(fate: Fate, source: ShardSource) -> list[tuple[str, int, int]]:
    starts = source.manifest.starts
    gone = np.concatenate([[0], np.cumsum(fate.rule != NOTHING, dtype=np.int64)])
    dropped, sizes = np.diff(gone[starts]), np.diff(starts)
    order = np.argsort(-dropped / sizes, kind="stable")[:NUM_SHARDS]
    return [(source.name_of(shard), int(sizes[shard]), int(dropped[shard])) for shard in order.tolist()]
