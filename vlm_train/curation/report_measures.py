"""Kept against dropped samples by what the manifest knows of them: two passes over its parts, one part in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.curation.clusters import uid_words
from vlm_train.curation.report_fate import NOTHING, Fate
from vlm_train.curation.report_flags import Flags, find_flags
from vlm_train.data.formats.base import SCHEMA
from vlm_train.data.manifest import Manifest
from vlm_train.data.stats import edges_of

NUM_BINS = 32
_OF_SCHEMA = ("width", "height", "caption_chars")
_MOST = 24  # columns

_OF_RULES = {
    "min_side": "shorter side",
    "max_side": "longer side",
    "max_aspect": "longer / shorter side",
    "min_pixels": "width x height",
    "max_pixels": "width x height",
}

Values = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """How a measure that differs is spread: `edges` [n + 1], and counts [n] of the kept and of the dropped samples that
    have it."""

    name: str
    edges: NDArray[np.float64]
    kept: NDArray[np.int64]
    dropped: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Borders:
    """Of a rule whose value is a measure: which, and the kept rows that come nearest to what it dropped, with their
    values: `below` the lowest dropped value, `above` the highest."""

    measure: str
    below: list[tuple[int, float]]
    above: list[tuple[int, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """What two passes find. `borders` by the number of the rule."""

    comparisons: list[Comparison]
    flags: Flags
    borders: dict[int, Borders]


def compare(manifest: Manifest, fate: Fate, *, num_nearest: int) -> Measures:
    """Compares what a chain kept with what it dropped, by every number and every flag that the manifest has.

    Args:
        manifest: columns of numbers count, hashes do not.
        fate: what became of its rows.
        num_nearest: rows on each side of `Borders`.

    Raises:
        DataError: a part is damaged.
    """
    numbers, flags = _columns(manifest), Flags.nothing_of(find_flags(manifest))
    low, high, same = _bounds(manifest, fate, numbers)
    edges = {name: edges_of(low[name], high[name], NUM_BINS) for name in low if low[name] < high[name]}
    counts = {name: np.zeros((2, NUM_BINS), np.int64) for name in edges}
    borders = {
        number: Borders(_meant(fate.rules[number].name, measures), [], [])
        for number, measures in same.items()
        if measures
    }
    spans = {number: _span(fate.value[fate.dropped_by(number)]) for number in borders}
    for start, table in _parts(manifest, [*numbers, *(flag.column for flag in flags.flags)]):
        rows = slice(start, start + len(table))
        kept, dropped = fate.is_kept[rows], fate.rule[rows] != NOTHING
        values = measured(table, numbers)
        for name, count in counts.items():
            for place, which in enumerate((kept, dropped)):
                count[place] += np.histogram(values[name][which & np.isfinite(values[name])], edges[name])[0]
        flags.add(table, kept | dropped, dropped)
        for number, border in borders.items():
            _take_nearest(border, spans[number], values[border.measure], kept, start, manifest, num_nearest)
    comparisons = [Comparison(name, edges[name], *counts[name]) for name in edges]
    return Measures(comparisons, flags, borders)


def measured(table: pa.Table, numbers: list[str]) -> Values:
    """Of rows of a manifest, float64 [n] each, NaN where there is nothing to measure: the columns `numbers`, and what
    follows from width and height."""
    given = [name for name in numbers if name in table.column_names]
    values = {name: table[name].cast(pa.float64()).to_numpy() for name in given}
    values |= {name: np.full(len(table), np.nan) for name in numbers if name not in given}
    width, height = (np.where(values[name] > 0, values[name], np.nan) for name in ("width", "height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    sides = {"width": width, "height": height, "shorter side": shorter, "longer side": longer}
    return {**values, **sides, "longer / shorter side": longer / shorter, "width x height": width * height}


def _meant(rule: str, measures: list[str]) -> str:
    """The measure that a rule looked at; of several with its values that of its name: of `min_side` the shorter."""
    return next((name for name in measures if name == _OF_RULES.get(rule)), measures[0])


def _columns(manifest: Manifest) -> list[str]:
    """Columns of numbers of all parts, as the first part that has them orders them."""
    numbers = dict.fromkeys(_OF_SCHEMA)
    for part in manifest.parts:
        fields = [field for field in pq.read_schema(part) if field.name not in SCHEMA.names]
        numbers |= dict.fromkeys(field.name for field in fields if _is_number(field.type))
    return list(numbers)[:_MOST]


def _is_number(kind: pa.DataType) -> bool:
    """Hashes, which are uint64, are none."""
    return pa.types.is_floating(kind) or (pa.types.is_integer(kind) and kind != pa.uint64())


def _parts(manifest: Manifest, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """(first row, table) of each part."""
    for shard, start in enumerate(manifest.starts[:-1].tolist()):
        yield start, manifest.part(shard, columns)


def _bounds(
    manifest: Manifest, fate: Fate, numbers: list[str]
) -> tuple[dict[str, float], dict[str, float], dict[int, list[str]]]:
    """(lowest, highest) finite value of each measure that has any; and by number of a rule the measures that its values
    are, in all rows that it dropped."""
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    same: dict[int, list[str]] = {}
    for start, table in _parts(manifest, numbers):
        values = measured(table, numbers)
        for name, column in values.items():
            finite = column[np.isfinite(column)]
            if len(finite):
                low[name] = min(low.get(name, np.inf), float(finite.min()))
                high[name] = max(high.get(name, -np.inf), float(finite.max()))
        rule, looked_at = fate.rule[start : start + len(table)], fate.value[start : start + len(table)]
        for number in np.unique(rule[rule != NOTHING]).tolist():
            rows = rule == number
            names = same.setdefault(number, list(values))
            same[number] = [name for name in names if np.array_equal(values[name][rows], looked_at[rows])]
    return low, high, same


def _span(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _take_nearest(
    border: Borders,
    span: tuple[float, float],
    values: NDArray[np.float64],
    kept: NDArray[np.bool_],
    start: int,
    manifest: Manifest,
    num: int,
) -> None:
    """Takes in the kept rows of a part that lie nearest to what was dropped; of equal values those of lower uid."""
    for taken, rows, sign in ((border.below, values < span[0], -1), (border.above, values > span[1], 1)):
        places = np.flatnonzero(kept & rows)
        if len(places) > num:
            limit = np.partition(sign * values[places], num - 1)[num - 1]
            places = places[sign * values[places] <= limit]
        taken += [(start + place, float(values[place])) for place in places.tolist()]
        low, high = uid_words(manifest.uids(np.array([row for row, _ in taken], np.int64)))
        order = np.lexsort((low, high, np.array([sign * value for _, value in taken])))[:num]
        taken[:] = [taken[place] for place in order.tolist()]
