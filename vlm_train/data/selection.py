"""Which rows of a manifest count, and how often: one bit or one weight a row, and a note of why.

A recipe never rewrites data; it names a selection. Training asks "which row stands in slot k of epoch e?", and both
kinds answer without a pass over the data, by one binary search and a look at one block of rows.

*Bits*: a row is kept or not, and the slots are the kept rows. The bits carry a count every 1,024 of them: 6.25 % more
memory (Jacobson, "Space-efficient static trees and graphs", FOCS 1989). One billion rows take 133 MB.

*Weights*: a row comes w times in an epoch, w being a multiple of 1/256. This is systematic sampling on integers (Madow
and Madow, "On the theory of systematic sampling", 1944): the weights of all rows lie end to end, in units of 1/256, and
slot k is the row that holds unit 256 k + u, with an offset u that the epoch decides. So a row comes floor(w) or ceil(w)
times in every epoch, and an epoch is always floor(sum of w) slots long. In any 256 epochs in a row u takes every value
once, so a row comes exactly 256 w times. The remainder at the end of the file, less than one sample's weight in an
epoch, is not drawn. Bits are the case of weights 0 and 1, in which u changes nothing. Weights are memory-mapped, two
bytes a row, shared by the ranks and workers of a node; the sums of 128 rows each add 3 % in every rank.

On disk: a directory with `provenance.json` (which manifest, how many rows, hashes of the content, and whatever the
author of the selection wrote about rules, thresholds and models) and either `selection.npy` (uint64 words, little
endian) or `weights.npy` (uint16 in units of 1/256, filled up with zeros to a multiple of 128).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.data import row_folder
from vlm_train.data.cumulative import UNIT, Bits, Cumulative, Weights
from vlm_train.errors import DataError

_VERSION = 2
_CHUNK = 1 << 17
_EPOCH_STEP = 159  # odd: 256 epochs meet all 256 offsets; next to 256 / golden ratio: a few epochs spread well too
_OWN_FACTS = {"version", "content", "manifest", "num_rows", "num_kept", "num_slots", "fingerprint", "checksum"}


class Selection:
    """How often each row of a manifest comes, and which row stands in which slot of an epoch.

    Args:
        content: the weights of the rows.
        manifest: fingerprint of the manifest that the rows belong to; None fits any of that length.
        provenance: how it came about, plain JSON.
    """

    def __init__(
        self, content: Cumulative, *, manifest: str | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.content = content
        self.num_rows, self.fingerprint = content.num_rows, content.fingerprint
        self.manifest, self.provenance = manifest, dict(provenance or {})

    @classmethod
    def all(cls, num_rows: int) -> Selection:
        """Every row."""
        return cls.from_mask(np.ones(num_rows, bool))

    @classmethod
    def from_mask(
        cls, mask: NDArray[np.bool_], *, manifest: str | None = None, provenance: Mapping[str, Any] | None = None
    ) -> Selection:
        """The rows where `mask` [num_rows] is True."""
        return cls(Bits.pack([mask], len(mask)), manifest=manifest, provenance=provenance)

    @classmethod
    def from_weights(
        cls, weights: NDArray[Any], *, manifest: str | None = None, provenance: Mapping[str, Any] | None = None
    ) -> Selection:
        """Row i comes `weights[i]` times in an epoch; [num_rows], rounded to the nearest 1/256.

        Raises:
            DataError: a weight is negative, above 255.996 or not a number.
        """
        chunks = (weights[row : row + _CHUNK] for row in range(0, len(weights), _CHUNK))
        return cls(Weights.pack(chunks, len(weights)), manifest=manifest, provenance=provenance)

    def __len__(self) -> int:
        """Slots of an epoch."""
        return self.content.total // UNIT

    def mask(self) -> NDArray[np.bool_]:
        """bool [num_rows]: the rows whose weight is not 0."""
        mask = np.zeros(self.num_rows, bool)
        mask[self.kept(0, self.num_rows)] = True
        return mask

    def kept(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rows of [start, stop) whose weight is not 0, in order."""
        return self.content.kept(start, stop)

    def counts(self, starts: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """Slots [len(starts) - 1] of each shard, `starts` being the first row of every shard and the end."""
        units = self.content.before(np.asarray(starts, np.int64))
        slots = (units - _offset(seed, epoch) + UNIT - 1) // UNIT  # how many k have 256 k + u below `units`
        return np.diff(np.minimum(slots, len(self)))

    def select(self, slots: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """The row in each of `slots` [n], each in [0, len(self)), of one epoch. Rows ascend with slots."""
        return self.content.find(np.asarray(slots, np.int64) * UNIT + _offset(seed, epoch))

    def verify(self) -> None:
        """Reads all of the content and compares it with the fingerprint; a load checks weights by their sums alone.

        Raises:
            DataError: it is not what the fingerprint was made of.
        """
        if self.content.content_hash() != self.fingerprint:
            raise DataError("the selection is damaged", got="content that does not match its fingerprint")

    def save(self, directory: Path | str) -> None:
        """Writes the selection into a new or existing directory; the old one stays whole until the end."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        facts = {
            **self.provenance,
            "version": _VERSION,
            "content": self.content.file_name,
            "manifest": self.manifest,
            "num_rows": self.num_rows,
            "num_kept": self.content.num_kept(),
            "num_slots": len(self),
            "fingerprint": self.fingerprint,
            "checksum": self.content.checksum(),
        }
        with open(target / f"{self.content.file_name}.tmp", "wb") as file:
            np.save(file, self.content.array, allow_pickle=False)
        (target / f"{row_folder.NAME}.tmp").write_bytes(row_folder.text_of(facts))
        for name in (self.content.file_name, row_folder.NAME):
            os.replace(target / f"{name}.tmp", target / name)
        for kind in (Bits, Weights):
            if kind.file_name != self.content.file_name:
                (target / kind.file_name).unlink(missing_ok=True)

    @classmethod
    def load(cls, directory: Path | str, manifest: str) -> Selection:
        """Reads a selection and checks that it was made for the manifest of fingerprint `manifest`.

        Raises:
            DataError: it is missing, damaged, or belongs to another manifest.
        """
        source = Path(directory)

        def make(facts: dict[str, Any]) -> tuple[Selection, Any]:
            own = {name: value for name, value in facts.items() if name not in _OWN_FACTS}
            found = cls(_read(source, facts), manifest=facts["manifest"], provenance=own)
            return found, facts.get("checksum", facts["fingerprint"])  # version 1 had no checksum

        contents = "the selection.npy or weights.npy that it names"
        found, checksum = row_folder.load(source, what="selection", contents=contents, version=_VERSION, make=make)
        if found.content.checksum() != checksum:
            raise DataError(f"selection `{source}` is damaged", got="content that does not match provenance.json")
        row_folder.check_manifest(source, what="selection", found=found.manifest, manifest=manifest)
        return found


def _read(source: Path, facts: Mapping[str, Any]) -> Cumulative:
    """The content that provenance.json names; version 1 knew bits alone."""
    name, num_rows = facts.get("content", Bits.file_name), int(facts["num_rows"])
    if name == Weights.file_name:
        units = np.load(source / name, mmap_mode="r", allow_pickle=False)
        return Weights(units, num_rows, str(facts["fingerprint"]))
    words = np.load(source / Bits.file_name, allow_pickle=False)
    if words.shape != (-(-num_rows // 64),):
        raise ValueError(f"{words.shape} words cannot hold the bits of {num_rows} rows")
    return Bits(words.astype(np.uint64), num_rows)


def _offset(seed: int, epoch: int) -> int:
    """u of an epoch, in [0, 256)."""
    return (hashlib.sha256(f"repeat {seed}".encode()).digest()[0] + _EPOCH_STEP * epoch) % UNIT
