"""A chain of steps, each of which drops rows among those that the ones before it keep, and the folder that tells of it.

    selection.npy, provenance.json   as any (`data.selection`); of each step its settings, what it dropped and found
    dropped.parquet                  of each dropped row: row, uid, step, rule, like (uid of the row for which it went,
                                     where it is there twice), value (what the rule looked at, in the rule's unit)
    steps/NAME.parquet               what one step dropped, so that a killed chain goes on behind the last whole step;
                                     and so does one whose later steps have other settings

A step looks at the manifest's columns, at the rows that are still kept, and at its settings. How many processes work,
where, and how often they were killed changes no byte of the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.curation.embeddings import Models
from vlm_train.curation.engines import Engine
from vlm_train.data.home import write_whole
from vlm_train.data.manifest import Manifest, to_parquet
from vlm_train.data.selection import Selection
from vlm_train.errors import ConfigError

FILE = "dropped.parquet"
STEPS = "steps"
STAMP, _FACTS = b"vlm_train stamp", b"vlm_train facts"

Settings = dict[str, Any]
Ticking = Callable[[str], Callable[[int, int], None]]
"""Of what is counted (`samples`), what to call with (done, in all)."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The rows that a step drops, M of them, each once, in any order.

    `rows` int64 [M]; `rules`: [M], by which of the step's rules each goes; `like` int64 [M]: the row for which it goes,
    -1 where there is none; `values` float64 [M]: what the rule looked at, NaN where there is nothing; `facts`: what
    else is worth knowing, plain JSON, for provenance.json.
    """

    rows: NDArray[np.int64]
    rules: NDArray[np.str_]
    like: NDArray[np.int64]
    values: NDArray[np.float64]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """With what a step works; nothing of it decides what is found.

    `engine`: where functions of shards run; `num_threads`: of what runs in this process; `models`: what embeds;
    `ticking`: how progress is told; `folder`: that of the selection, which all processes of the engine can see, for
    files that a step needs on its way.
    """

    engine: Engine
    num_threads: int
    models: Models
    ticking: Ticking
    folder: Path


@runtime_checkable
class Step(Protocol):
    """One step of a chain."""

    def settings(self, work: Work) -> Settings:
        """All that decides what it finds beside the rows: plain JSON, with versions and hashes of models. Raises
        ConfigError for what cannot be meant."""

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """What goes of the rows `among` [N]. Raises what the work raises."""


@runtime_checkable
class Leaves(Protocol):
    """A step that leaves more than its table, of which a chain has one at most: the next would write over it."""

    def is_there(self, manifest: Manifest, work: Work) -> bool:
        """Whether what it left is there, and its own. If not it is run again."""


def run_chain(
    manifest: Manifest,
    steps: Mapping[str, Step],
    *,
    work: Work,
    among: Selection | None = None,
) -> Selection:
    """Runs the steps in their order and writes the folder of `work`, the selection last.

    Args:
        manifest: what the steps look at; they may add columns to its parts.
        steps: by names of the user's, which name files too.
        work: see `Work`.
        among: the rows to begin with; None is all.

    Raises:
        ConfigError: a name that is no name of a file, two steps that leave the same; and as the steps do.
        DataError: as the steps do.
    """
    if wrong := [name for name in steps if not re.fullmatch(r"\w[\w-]*", name)]:
        raise ConfigError("a step cannot be called so", got=wrong[0], allowed="letters, digits, _ and -",
                          remedy="call it otherwise: curation.steps.NAME")  # fmt: skip
    kinds = [type(step).__name__ for step in steps.values() if isinstance(step, Leaves)]
    if len(set(kinds)) < len(kinds):
        raise ConfigError("two steps of a chain would write over each other", got=f"{len(kinds)} x {kinds[0]}",
                          allowed="one of it", remedy="give one of them all that they look for")  # fmt: skip
    out = work.folder
    kept = np.ones(len(manifest), bool) if among is None else among.mask()
    told, tables = [], []
    settings = {name: step.settings(work) for name, step in steps.items()}  # refused before any of them works
    out.mkdir(parents=True, exist_ok=True)
    for name, step in steps.items():
        num_before = int(kept.sum())
        table = _whole(manifest, out / STEPS / f"{name}.parquet", kept, step, settings[name], work)
        rows, facts = table["row"].to_numpy(), json.loads(table.schema.metadata[_FACTS])
        kept[rows] = False
        rules, counts = np.unique(table["rule"].to_numpy(zero_copy_only=False).astype(str), return_counts=True)
        dropped = {str(rule): int(count) for rule, count in zip(rules, counts, strict=True)}
        told.append({"step": name, "settings": settings[name], "facts": facts, "num_before": num_before,
                     "num_dropped": dropped})  # fmt: skip
        tables.append(_named(manifest, table, name))
    provenance = {"steps": told, "among": None if among is None else among.fingerprint}
    selection = Selection.from_mask(kept, manifest=manifest.fingerprint, provenance=provenance)
    write_whole(out / FILE, to_parquet(pa.concat_tables(tables)))
    selection.save(out)
    for path in (out / STEPS).glob("*.parquet"):
        if path.stem not in steps and _is_own(path):
            path.unlink()
    return selection


def _is_own(path: Path) -> bool:
    """Whether a file is that of a step."""
    try:
        return STAMP in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def read_stamped(path: Path, stamp: bytes) -> pa.Table | None:
    """A table whose metadata have `STAMP`, what decided it; None where it is not there, not whole, or another's."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read() if (file.schema_arrow.metadata or {}).get(STAMP) == stamp else None
    except (OSError, pa.ArrowException):
        return None


def _whole(
    manifest: Manifest, path: Path, kept: NDArray[np.bool_], step: Step, settings: Settings, work: Work
) -> pa.Table:
    """What the step drops: read where it has been found of the same rows with the same settings, else found."""
    told = {"manifest": manifest.fingerprint, "among": Selection.from_mask(kept).fingerprint, "settings": settings}
    stamp = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest().encode()
    whole = read_stamped(path, stamp)
    if whole is not None and (not isinstance(step, Leaves) or step.is_there(manifest, work)):
        return whole
    found = step.find(manifest, kept.copy(), work)
    order = np.argsort(found.rows, kind="stable")
    columns = {
        "row": pa.array(found.rows[order], pa.int64()),
        "rule": pa.array(found.rules[order], pa.string()),
        "like": pa.array(found.like[order], pa.int64()),
        "value": pa.array(found.values[order], pa.float64(), from_pandas=True),
    }
    metadata = {STAMP: stamp, _FACTS: json.dumps(found.facts, sort_keys=True).encode()}
    table = pa.table(columns).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_parquet(table))
    return table


def _named(manifest: Manifest, table: pa.Table, step: str) -> pa.Table:
    """Rows as they are called outside: by uid, which two samples may share, so by number too."""
    rows, like = table["row"].to_numpy(), table["like"].to_numpy()
    columns = {
        "row": table["row"],
        "uid": uid_column(manifest.uids(rows)),
        "step": pa.array([step] * len(rows), pa.string()),
        "rule": table["rule"],
        "like": pa.array(uid_column(manifest.uids(np.maximum(like, 0))).to_pylist(), pa.binary(16), mask=like < 0),
        "value": table["value"],
    }
    return pa.table(columns)


def uid_column(uids: NDArray[np.uint8]) -> pa.Array:
    """uids [N, 16] as a column."""
    return pa.Array.from_buffers(pa.binary(16), len(uids), [None, pa.py_buffer(np.ascontiguousarray(uids))])
