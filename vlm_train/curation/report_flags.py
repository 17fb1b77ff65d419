"""Which samples have which of the things that the manifest says with a yes or with one of a few words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.data.formats.base import SCHEMA
from vlm_train.data.manifest import Manifest

_MOST = 24  # flags
_MOST_WORDS, _LONGEST_WORD = 200, 80  # what has more, or longer ones, is a text


@dataclass(frozen=True, slots=True)
class Flag:
    """A column that is true or false, or, with a `word`, a column of which this is one of the values."""

    column: str
    word: str | None

    @property
    def name(self) -> str:
        """What it is called."""
        return self.column if self.word is None else f"{self.column}: {self.word}"

    def of(self, table: pa.Table) -> NDArray[np.bool_]:
        """bool [n], whether the rows of a manifest have it."""
        if self.column not in table.column_names:
            return np.zeros(len(table), bool)
        column = table[self.column] if self.word is None else pc.equal(table[self.column], self.word)
        return np.asarray(column.fill_null(False).to_numpy())


@dataclass(frozen=True, slots=True, eq=False)
class Flags:
    """`together` int64 [F, F]: samples that have both, the diagonal those that have one; `dropped` int64 [F]: of these,
    dropped ones."""

    flags: list[Flag]
    together: NDArray[np.int64]
    dropped: NDArray[np.int64]

    @staticmethod
    def nothing_of(flags: list[Flag]) -> Flags:
        """Before any row was counted."""
        return Flags(flags, np.zeros((len(flags), len(flags)), np.int64), np.zeros(len(flags), np.int64))

    def add(self, table: pa.Table, begun: NDArray[np.bool_], dropped: NDArray[np.bool_]) -> None:
        """Counts rows of a manifest: those that the chain began with."""
        has = [flag.of(table) & begun for flag in self.flags]
        for place, one in enumerate(has):
            self.together[place] += [int((one & other).sum()) for other in has]
            self.dropped[place] += int((one & dropped).sum())


def find_flags(manifest: Manifest) -> list[Flag]:
    """The columns that are true or false, and the words of those with few: the most frequent ones, of equal ones those
    that come first by name. A part in memory at a time, and of that these columns alone.

    Raises:
        DataError: a part is damaged.
    """
    booleans: dict[str, None] = {}
    words: dict[str, Counter[str]] = {}
    texts: set[str] = set()
    for shard, part in enumerate(manifest.parts):
        fields = [field for field in pq.read_schema(part) if field.name not in SCHEMA.names]
        booleans |= dict.fromkeys(field.name for field in fields if pa.types.is_boolean(field.type))
        wanted = [field.name for field in fields if pa.types.is_string(field.type) and field.name not in texts]
        table = manifest.part(shard, wanted) if wanted else pa.table({})
        for name in wanted:
            counted = words.setdefault(name, Counter())
            counted.update(_counts(table[name]))
            if len(counted) > _MOST_WORDS or max(map(len, counted), default=0) > _LONGEST_WORD:
                texts.add(name)
    found = [(num, Flag(name, word)) for name in words.keys() - texts for word, num in words[name].items()]
    ordered = sorted(found, key=lambda each: (-each[0], each[1].name))
    return [*[Flag(name, None) for name in booleans], *[flag for _, flag in ordered]][:_MOST]


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each word comes, but for none and the empty one."""
    counts = column.value_counts()
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    return {word: num for word, num in pairs if word}
