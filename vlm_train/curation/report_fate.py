"""What a chain of curation did to each row: read from its folder, in a few numbers a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.curation.chain import STEPS
from vlm_train.data.manifest import Manifest
from vlm_train.data.selection import Selection
from vlm_train.errors import ConfigError, DataError

NOTHING = -1


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a step. `num_before`: rows that the step looked at; `limit`: the setting of the rule's own name, where
    that is a number."""

    step: str
    name: str
    num_before: int
    num_dropped: int
    limit: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Fate:
    """Of N rows.

    `rules`: all that dropped something, in the order of the steps; `rule` int16 [N]: the number of the rule by which a
    row went, -1 for none; `like` int64 [N]: the row for which it went, -1 where there is none; `value` float64 [N]:
    what the rule looked at, or NaN; `is_kept` bool [N]: neither kept nor gone by a rule are the rows that the chain did
    not begin with; `provenance`, `fingerprint`: of the folder.
    """

    rules: list[Rule]
    rule: NDArray[np.int16]
    like: NDArray[np.int64]
    value: NDArray[np.float64]
    is_kept: NDArray[np.bool_]
    provenance: dict[str, Any]
    fingerprint: str

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What provenance.json tells of each step."""
        return list(self.provenance["steps"])

    def num_begun(self) -> int:
        """Rows that the chain began with."""
        return int(self.steps[0]["num_before"])

    def dropped_by(self, number: int) -> NDArray[np.int64]:
        """Rows that a rule dropped, ascending."""
        return np.flatnonzero(self.rule == number)


def read_fate(folder: Path, manifest: Manifest) -> Fate:
    """Reads the folder of a chain. Memory: 19 bytes for each row of the manifest.

    Raises:
        ConfigError: a selection that no chain of steps made.
        DataError: it is missing, damaged, made for other data, or its steps are not those that it tells of.
    """
    selection = Selection.load(folder, manifest.fingerprint)
    steps = selection.provenance.get("steps")
    if not steps:
        raise ConfigError("this selection tells of no steps, so there is nothing to report", got=folder,
                          allowed="a folder that a step or a chain of curation wrote",
                          remedy="vlm-train data dedup SHARDS --out DIR, then report DIR")  # fmt: skip
    num = len(manifest)
    fate = Fate(
        rules=[],
        rule=np.full(num, NOTHING, np.int16),
        like=np.full(num, NOTHING),
        value=np.full(num, np.nan),
        is_kept=selection.mask(),
        provenance=selection.provenance,
        fingerprint=selection.fingerprint,
    )
    try:
        for step in steps:
            _read_step(fate, step, folder / STEPS / f"{step['step']}.parquet")
    except DataError:
        raise
    except Exception as error:  # readers of Parquet raise whatever they like on damaged bytes
        raise _damaged(folder, f"{type(error).__name__}: {error}") from None
    return fate


def _read_step(fate: Fate, step: dict[str, Any], path: Path) -> None:
    """Takes in the rows that a step dropped."""
    try:
        with pq.ParquetFile(path, read_dictionary=["rule"], page_checksum_verification=True) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    column = table["rule"].combine_chunks()
    column = column.dictionary_encode() if not isinstance(column, pa.DictionaryArray) else column
    names, rows = column.dictionary.to_pylist(), table["row"].to_numpy()
    codes = column.indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(codes, minlength=len(names)).tolist()
    if dict(zip(names, counts, strict=True)) != step["num_dropped"] or fate.is_kept[rows].any():
        raise _damaged(path, "other rows than provenance.json counts")
    order = sorted(range(len(names)), key=lambda place: (-counts[place], names[place]))
    numbers = np.empty(len(names), np.int16)
    numbers[order] = len(fate.rules) + np.arange(len(names), dtype=np.int16)
    for place in order:
        limit = step["settings"].get(names[place])
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        fate.rules.append(Rule(str(step["step"]), names[place], int(step["num_before"]), counts[place],
                               float(limit) if is_number else None))  # fmt: skip
    fate.rule[rows], fate.like[rows] = numbers[codes], table["like"].to_numpy()
    fate.value[rows] = table["value"].to_numpy()


def _damaged(path: Path, got: object) -> DataError:
    return DataError(
        f"`{path}` is not what a finished chain leaves",
        got=got,
        allowed="the steps that provenance.json tells of, as they were written",
        remedy="run the command that made the folder again: it goes on where it was",
    )
