"""A walk through the rows of a manifest in which neighbours are alike: what groups of hard negatives are cut from.

It is made once (`vlm-train data walk`, `bisection`), and says only which rows lie near each other; where it is cut, and
in what order the pieces come, is the order's to say (`grouped`). On disk: a directory with `walk.bin` (uint32, from
2^32 rows on uint64, little-endian: the row at each place, every row once) and `provenance.json` (which manifest, how
many rows, the sha256 of walk.bin, and whatever its author wrote about model and settings). Ranks and workers of a node
map the file and share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.data import row_folder
from vlm_train.data.home import write_whole
from vlm_train.errors import DataError

_VERSION = 1
_FILE = "walk.bin"
_CHUNK = 1 << 17
_OWN_FACTS = {"version", "manifest", "num_rows", "sha256"}


class Walk:
    """Every row of a manifest once, in an order of somebody's choice.

    Args:
        rows: [num_rows] the row at each place.
        manifest: fingerprint of the manifest that the rows belong to; None fits any of that length.
        provenance: how it came about, plain JSON.

    Raises:
        DataError: a row is missing, comes twice or does not exist.
    """

    def __init__(
        self, rows: NDArray[Any], *, manifest: str | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        seen = np.zeros(len(rows), bool)
        for place in range(0, len(rows), _CHUNK):
            some = rows[place : place + _CHUNK]
            seen[some[(some >= 0) & (some < len(rows))]] = True
        if not seen.all():
            raise DataError(
                "a walk passes through every row once",
                got=f"{len(rows)} places, where {int((~seen).sum())} of as many rows do not occur",
                remedy="make the walk again",
            )
        self.rows = np.ascontiguousarray(rows, _kind(len(rows)))
        self.num_rows, self.fingerprint = len(rows), hashlib.sha256(self.rows.data).hexdigest()
        self.manifest, self.provenance = manifest, dict(provenance or {})

    def save(self, directory: Path | str) -> None:
        """Writes the walk into a new or existing directory, provenance.json last."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        facts = {
            **self.provenance,
            "version": _VERSION,
            "manifest": self.manifest,
            "num_rows": self.num_rows,
            "sha256": self.fingerprint,
        }
        write_whole(target / _FILE, self.rows.data)
        write_whole(target / row_folder.NAME, row_folder.text_of(facts))

    @classmethod
    def load(cls, directory: Path | str, manifest: str) -> Walk:
        """Maps a walk and checks that it is whole and was made for the manifest of fingerprint `manifest`.

        Raises:
            DataError: it is missing, damaged, or belongs to another manifest.
        """
        source = Path(directory)

        def make(facts: dict[str, Any]) -> tuple[Walk, str]:
            rows = np.memmap(source / _FILE, _kind(facts["num_rows"]), mode="r")
            own = {name: value for name, value in facts.items() if name not in _OWN_FACTS}
            return cls(rows, manifest=facts["manifest"], provenance=own), facts["sha256"]

        contents = f"{_FILE}, as `vlm-train data walk` writes it"
        found, sha256 = row_folder.load(source, what="walk", contents=contents, version=_VERSION, make=make)
        if found.fingerprint != sha256:
            raise DataError(f"walk `{source}` is damaged", got=f"{_FILE} that does not match provenance.json",
                            remedy="make the walk again")  # fmt: skip
        row_folder.check_manifest(source, what="walk", found=found.manifest, manifest=manifest)
        return found


def _kind(num_rows: int) -> str:
    return "<u4" if num_rows <= 1 << 32 else "<u8"
