"""Which rows of a manifest count: one bit a row, and a note of why.

A recipe never rewrites data; it names a selection. Training asks "which row is the k-th that is kept?" (select), so the
bits carry a count every 1,024 of them: 6.25 % more memory, and the answer is one binary search plus 16 words
(Jacobson, "Space-efficient static trees and graphs", FOCS 1989). One billion rows take 133 MB.

On disk: a directory with `selection.npy` (uint64 words, little endian) and `provenance.json` (which manifest, how many
rows, sha256 of the bits, and whatever the author of the selection wrote about rules, thresholds and models).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.errors import DataError

_WORD = 64
_BLOCK_WORDS = 16
_BLOCK = _WORD * _BLOCK_WORDS
_VERSION = 1


class Selection:
    """A set of manifest rows with rank and select.

    Args:
        words: uint64 [ceil(num_rows / 64)], bit i of word w is row 64 w + i.
        num_rows: rows of the manifest.
        manifest: fingerprint of the manifest that the rows belong to; None fits any of that length.
        provenance: how it came about, plain JSON.
    """

    def __init__(
        self,
        *,
        words: NDArray[np.uint64],
        num_rows: int,
        manifest: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        num_words = -(-num_rows // _BLOCK) * _BLOCK_WORDS  # whole blocks, so that `select` needs no special end
        self._words = np.zeros(num_words, np.uint64)
        self._words[: len(words)] = words
        per_block = np.bitwise_count(self._words.reshape(-1, _BLOCK_WORDS)).sum(axis=1, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(per_block)])
        self.num_rows, self.manifest, self.provenance = num_rows, manifest, dict(provenance or {})
        self.fingerprint = hashlib.sha256(num_rows.to_bytes(8, "little") + self._words.tobytes()).hexdigest()

    @classmethod
    def all(cls, num_rows: int) -> Selection:
        """Every row."""
        return cls.from_mask(np.ones(num_rows, bool))

    @classmethod
    def from_mask(
        cls, mask: NDArray[np.bool_], *, manifest: str | None = None, provenance: Mapping[str, Any] | None = None
    ) -> Selection:
        """The rows where `mask` [num_rows] is True."""
        padded = np.zeros(-(-len(mask) // _WORD) * _WORD, bool)
        padded[: len(mask)] = mask
        words = np.packbits(padded, bitorder="little").view("<u8").astype(np.uint64)
        return cls(words=words, num_rows=len(mask), manifest=manifest, provenance=provenance)

    def __len__(self) -> int:
        return int(self._before[-1])

    def mask(self) -> NDArray[np.bool_]:
        """bool [num_rows]."""
        bits = np.unpackbits(self._words.astype("<u8").view(np.uint8), bitorder="little")
        return bits[: self.num_rows].astype(bool)

    def rank(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many kept rows come before each of `rows` [n], each in [0, num_rows]."""
        rows = np.asarray(rows, np.int64)
        block = np.minimum(rows // _BLOCK, len(self._before) - 2) if len(self._words) else rows * 0
        if not len(self._words):
            return block
        words = self._words.reshape(-1, _BLOCK_WORDS)[block]
        bits = np.clip((rows - block * _BLOCK)[:, None] - np.arange(0, _BLOCK, _WORD), 0, _WORD)
        whole = bits == _WORD
        below = np.where(whole, 0, (np.uint64(1) << np.where(whole, 0, bits).astype(np.uint64)) - np.uint64(1))
        masks = np.where(whole, np.uint64(0xFFFFFFFFFFFFFFFF), below.astype(np.uint64))
        return self._before[block] + np.bitwise_count(words & masks).sum(axis=1, dtype=np.int64)

    def select(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of the k-th kept sample for each k of `ranks` [n], each in [0, len(self))."""
        ranks = np.asarray(ranks, np.int64)
        block = np.searchsorted(self._before, ranks, side="right") - 1
        words = self._words.reshape(-1, _BLOCK_WORDS)[block]
        left = ranks - self._before[block]
        word, left = _first_above(np.bitwise_count(words), left)
        chosen = words[np.arange(len(ranks)), word]
        bits = (chosen[:, None] >> np.arange(_WORD, dtype=np.uint64)) & np.uint64(1)
        bit, _ = _first_above(bits, left)
        return block * _BLOCK + word * _WORD + bit

    def counts(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Kept rows [len(starts) - 1] of each shard, `starts` being the first row of every shard and the end."""
        return np.diff(self.rank(starts))

    def save(self, directory: Path | str) -> None:
        """Writes the selection into a new or existing directory; the old one stays whole until the end."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        bits = self._words[: -(-self.num_rows // _WORD)].astype("<u8")
        facts = {
            **self.provenance,
            "version": _VERSION,
            "manifest": self.manifest,
            "num_rows": self.num_rows,
            "num_kept": len(self),
            "fingerprint": self.fingerprint,
        }
        with open(target / "selection.npy.tmp", "wb") as file:
            np.save(file, bits, allow_pickle=False)
        (target / "provenance.json.tmp").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        for name in ("selection.npy", "provenance.json"):
            os.replace(target / f"{name}.tmp", target / name)

    @classmethod
    def load(cls, directory: Path | str, manifest: str) -> Selection:
        """Reads a selection and checks that it was made for the manifest of fingerprint `manifest`.

        Raises:
            DataError: it is missing, damaged, or belongs to another manifest.
        """
        source = Path(directory)
        try:
            facts = json.loads((source / "provenance.json").read_text())
            words = np.load(source / "selection.npy", allow_pickle=False)
            own = {"version", "manifest", "num_rows", "num_kept", "fingerprint"}
            found = cls(
                words=words.astype(np.uint64),
                num_rows=int(facts["num_rows"]),
                manifest=facts["manifest"],
                provenance={name: value for name, value in facts.items() if name not in own},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"selection `{source}` cannot be read",
                got=f"{type(error).__name__}: {error}",
                allowed="a directory with selection.npy and provenance.json",
                remedy="make the selection again",
            ) from None
        if found.fingerprint != facts["fingerprint"]:
            raise DataError(f"selection `{source}` is damaged", got="bits that do not match provenance.json")
        if found.manifest not in (None, manifest):
            raise DataError(
                f"selection `{source}` was made for other data",
                got=f"manifest {found.manifest}",
                allowed=f"manifest {manifest}",
                remedy="give the shards it was made for, or make it again on these",
            )
        return found


def _first_above(counts: NDArray[Any], left: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per row: the first column whose running total exceeds `left`, and what of `left` remains before it."""
    totals = np.cumsum(counts, axis=1, dtype=np.int64)
    column = (totals > left[:, None]).argmax(axis=1)
    rows = np.arange(len(left))
    return column, left - (totals[rows, column] - counts[rows, column].astype(np.int64))
