"""Captions as steps read them: from the column of a part, so that no shard is read again, a part at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.curation import texts
from vlm_train.curation.chain import Work
from vlm_train.curation.columns import add_columns
from vlm_train.data.manifest import Manifest, read_part


@dataclass(frozen=True, slots=True, eq=False)
class CaptionPart:
    """Some rows of a part of the manifest. `content`: the hash of all its rows; `rows` int64 [n]: counted from the
    first of the part, ascending; `first`: the row of the manifest that is the first of the part."""

    part: Path
    content: str
    first: int
    rows: NDArray[np.int64]

    def captions(self) -> list[str | None]:
        """Of each row, None where it cannot be read. Raises DataError as `read_part`."""
        column = read_part(self.part, self.content, ["caption"])["caption"]
        return column.take(pa.array(self.rows)).to_pylist()


def caption_parts(manifest: Manifest, rows: NDArray[np.int64]) -> list[CaptionPart]:
    """The parts of `rows` [n], ascending, in their order; the manifest has `texts.CAPTION`."""
    borders = np.searchsorted(rows, manifest.starts)
    facts = zip(manifest.parts, manifest.entries_of, manifest.starts[:-1].tolist(), strict=True)
    return [
        CaptionPart(part.absolute(), entry["content"], first, rows[borders[shard] : borders[shard + 1]] - first)
        for shard, (part, entry, first) in enumerate(facts)
        if borders[shard] < borders[shard + 1]
    ]


def add_captions(manifest: Manifest, work: Work) -> None:
    """Gives the parts the columns `texts.CAPTION`, where they have them not. Raises DataError as `add_columns`."""
    add_columns(manifest, texts.CAPTION, engine=work.engine, progress=work.ticking("samples"))
