"""Samples that are those of a benchmark too: by their pictures, by what a model makes of these, and by their texts.

What is found is told per benchmark and flagged, in the column `contaminated_by` of the manifest, which is that of the
last command; it is dropped only by the rules that the user names. In the folder of the selection:

    hits.parquet    benchmark, rule, uid of the sample, hit (uid of the sample of the benchmark), value

The rules, each on all samples of the manifest: `exact` and `near`, as copies are found among samples (`near`; cropped
ones count as near); `model`:
the cosine with a picture of the benchmark is at least `min_cosine`, the nearest is told; `text`: a run of `num_words`
words of a caption or a turn of a dialogue is in the benchmark too (`word_runs`), the first such sample is told.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.curation import alignment, fingerprints, kmeans, near, word_runs
from vlm_train.curation.chain import Found, Settings, Work, uid_column
from vlm_train.curation.columns import FINGERPRINT, add_columns, set_column
from vlm_train.curation.limits import check_whole
from vlm_train.data.home import write_whole
from vlm_train.data.indexing import open_manifest
from vlm_train.data.manifest import Manifest, to_parquet
from vlm_train.errors import ConfigError

FILE, COLUMN = "hits.parquet", "contaminated_by"
MODEL, TEXT = "model", "text"
RULES = (near.EXACT, near.NEAR, MODEL, TEXT)
_MARK = b"vlm_train"
_BLOCK, _MOST = 1024, 64  # a bit of a flag each

Hits = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.str_], NDArray[np.float64]]
"""Of one benchmark: (rows [n], rows of the benchmark [n], rules [n], values [n])."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decontaminate:
    """See the module. `against`: name of a benchmark -> its shards; `drop`: rules by which samples go, none of them by
    default; `radius`: bits of pHash; `num_words`: of a run, null is no look at texts; `run` and `min_cosine` belong
    together. The value of a row is what `near`, `model` and `text` looked at: bits, cosine, nothing."""

    against: Mapping[str, str | Sequence[str]]
    drop: Sequence[str] = field(default_factory=list)
    radius: int = near.RADIUS
    num_words: int | None = 13
    run: str | None = None
    min_cosine: float | None = None

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        self._check()
        check_whole("radius", self.radius, low=0, high=near.MOST_BITS)
        return {
            "against": {name: open_manifest(shards).fingerprint for name, shards in sorted(self.against.items())},
            "drop": sorted(self.drop),
            "fingerprints": fingerprints.VERSION,
            "alignment": alignment.VERSION,
            "radius": self.radius,
            "num_words": self.num_words,
            "model": None if self.run is None else work.models.identity(self.run),
            "min_cosine": self.min_cosine,
        }

    def _check(self) -> None:
        if not 0 < len(self.against) <= _MOST:
            raise ConfigError("there are benchmarks to look for", got=len(self.against), allowed=f"1 to {_MOST}",
                              remedy="--against coco=data/coco/val")  # fmt: skip
        if wrong := [name for name in self.against if not re.fullmatch(r"[^\s/]+", str(name))]:
            raise ConfigError("a benchmark cannot be called so", got=repr(wrong[0]), allowed="a word",
                              remedy="--against coco=data/coco/val")  # fmt: skip
        if strange := [shards for shards in self.against.values() if not _are_shards(shards)]:
            raise ConfigError("a benchmark has shards", got=strange[0], allowed="a text, or a list of texts",
                              remedy="{coco: data/coco/val}")  # fmt: skip
        if wrong := sorted(set(self.drop) - set(RULES)):
            raise ConfigError("no such rule to drop by", got=wrong[0], allowed=", ".join(RULES), remedy="--drop exact")
        if self.num_words is not None and self.num_words < 1:
            raise ConfigError("a run of words has words", got=self.num_words, allowed="1 or more, or null",
                              remedy="num_words: 13")  # fmt: skip
        if (self.run is None) != (self.min_cosine is None):
            raise ConfigError("a model says how alike pictures are, and min_cosine how alike is too much",
                              got=f"run {self.run} and min_cosine {self.min_cosine}", allowed="both, or neither",
                              remedy="--run RUN --min-cosine 0.9")  # fmt: skip
        if self.min_cosine is not None and not 0 < self.min_cosine <= 1:
            raise ConfigError("min_cosine is out of range", got=self.min_cosine, allowed="above 0, up to 1",
                              remedy="min_cosine: 0.9")  # fmt: skip
        asleep = [name for name, looks in ((MODEL, self.run), (TEXT, self.num_words)) if looks is None]
        if wrong := sorted(set(self.drop) & set(asleep)):
            raise ConfigError(f"nothing is looked at by the rule {wrong[0]}, so nothing can be dropped by it",
                              got=f"drop {wrong[0]}", allowed="model with a run, text with num_words",
                              remedy="--run RUN --min-cosine 0.9, or --num-words 13")  # fmt: skip

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        add_columns(manifest, FINGERPRINT, engine=work.engine, progress=work.ticking("samples"))
        flags, tables, facts = np.zeros(len(manifest), np.uint64), [], {}  # a bit for each benchmark
        dropped: list[Hits] = []
        for number, (name, shards) in enumerate(sorted(self.against.items())):
            benchmark = open_manifest(shards)
            rows, others, rules, values = hits = _joined([*self._hits(manifest, benchmark, work)])
            flags[np.unique(rows)] |= np.uint64(1 << number)
            tables.append(_table(name, hits, manifest, benchmark))
            facts[name] = {
                "num_samples": len(benchmark),
                "num_hit": len(np.unique(others)),
                "num_flagged": {rule: len(np.unique(rows[rules == rule])) for rule in RULES if (rules == rule).any()},
            }
            chosen = among[rows] & np.isin(rules, list(self.drop))
            dropped.append((rows[chosen], others[chosen], rules[chosen], values[chosen]))
        mark = {_MARK: self._mark(work)}
        write_whole(work.folder / FILE, to_parquet(pa.concat_tables(tables).replace_schema_metadata(mark)))
        set_column(manifest, pa.field(COLUMN, pa.string(), metadata=mark), partial(_names, flags, sorted(self.against)))
        rows, _, rules, values = _joined(dropped)
        rows, first = np.unique(rows, return_index=True)  # by the first benchmark and rule of several
        return Found(rows, rules[first], np.full(len(rows), -1), values[first], {"benchmarks": facts})

    def is_there(self, manifest: Manifest, work: Work) -> bool:
        """See `Leaves`: the table of hits, and the column in every part."""
        mark = self._mark(work)
        try:
            marks = [(pq.read_schema(work.folder / FILE).metadata or {}).get(_MARK)]
            marks += [(pq.read_schema(part).field(COLUMN).metadata or {}).get(_MARK) for part in manifest.parts]
        except (OSError, KeyError, pa.ArrowException):
            return False
        return all(found == mark for found in marks)

    def _mark(self, work: Work) -> bytes:
        """Of what is found, whatever is dropped of it."""
        told = {name: value for name, value in self.settings(work).items() if name != "drop"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest().encode()

    def _hits(self, manifest: Manifest, benchmark: Manifest, work: Work) -> Iterator[Hits]:
        add_columns(benchmark, FINGERPRINT, engine=work.engine, progress=work.ticking("samples of a benchmark"))
        shared = near.pairs_between(
            manifest, benchmark, radius=self.radius, workers=work.num_threads, ticking=work.ticking
        )
        rules = np.where(shared.is_exact, near.EXACT, near.NEAR)
        yield shared.rows[:, 0], shared.rows[:, 1], rules, shared.distance.astype(np.float64)
        if self.run is not None and self.min_cosine is not None:
            yield _by_model(manifest, benchmark, self.run, self.min_cosine, work)
        if self.num_words is not None:
            runs = word_runs.runs_of(benchmark, self.num_words, engine=work.engine)
            file = work.folder / "steps" / "word_runs.bin"
            pairs = word_runs.shared_with(manifest, runs, self.num_words, engine=work.engine, file=file)
            yield pairs[:, 0], pairs[:, 1], np.full(len(pairs), TEXT), np.full(len(pairs), np.nan)


def _are_shards(shards: Any) -> bool:
    listed = [shards] if isinstance(shards, str) else shards
    return isinstance(listed, list) and all(isinstance(shard, str) for shard in listed) and bool(listed)


def _by_model(manifest: Manifest, benchmark: Manifest, run: str, min_cosine: float, work: Work) -> Hits:
    """The nearest sample of the benchmark, where it is near enough; of equally near ones that of the lowest uid."""
    ours, theirs = (work.models.embed(samples, run, "image") for samples in (manifest, benchmark))
    order = kmeans.uid_order(benchmark.uids(theirs.rows))
    keys, others = kmeans.unit_rows(theirs.features, order, "cpu"), theirs.rows[order]
    found: list[Hits] = []
    for start in range(0, len(ours.rows), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(ours.rows)))
        cosines = (kmeans.unit_rows(ours.features, block, "cpu") @ keys.T).float().double().numpy()
        nearest = cosines.argmax(axis=1)
        values = cosines[np.arange(len(nearest)), nearest]
        hit = values >= min_cosine
        found.append((ours.rows[block][hit], others[nearest[hit]], np.full(int(hit.sum()), MODEL), values[hit]))
    return _joined(found)


def _names(flags: NDArray[np.uint64], names: Sequence[str], first: int, stop: int) -> pa.Array:
    """The benchmarks of rows first to stop, with a space between; null where there is none."""
    known, places = np.unique(flags[first:stop], return_inverse=True)
    texts = [" ".join(name for number, name in enumerate(names) if mask >> number & 1) for mask in known.tolist()]
    return pa.array([text or None for text in texts], pa.string()).take(pa.array(places))


def _joined(hits: Sequence[Hits]) -> Hits:
    nothing: Hits = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, "U8"), np.empty(0)
    rows, others, rules, values = (np.concatenate(parts) for parts in zip(nothing, *hits, strict=True))
    return rows, others, rules, values


def _table(name: str, hits: Hits, manifest: Manifest, benchmark: Manifest) -> pa.Table:
    rows, others, rules, values = hits
    order = np.lexsort((others, rows, rules))
    columns: dict[str, Any] = {
        "benchmark": pa.array([name] * len(rows), pa.string()),
        "rule": pa.array(rules[order].tolist(), pa.string()),
        "uid": uid_column(manifest.uids(rows[order])),
        "hit": uid_column(benchmark.uids(others[order])),
        "value": pa.array(values[order], pa.float64(), from_pandas=True),
    }
    return pa.table(columns)
