"""Shards whose samples have the captions of a table: nothing else of them changes, and their uids stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.cumulative import UNIT, Weights
from vlm_train.data.decode import SampleError, decode_metadata
from vlm_train.data.recaption_table import CaptionTable
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import to_json
from vlm_train.errors import DataError
from vlm_train.types import RawSample


class RecaptionedSource:
    """A source read with the captions of a table in place of its own, `KEY.txt` included.

    A sample that has no captions there cannot be had (`no_caption`): either the filter left none of them, or the table
    does not know it. `narrowed` takes such samples out of a selection, so training never meets one.

    Args:
        source: the shards.
        where: the folder or file of the table.

    Raises:
        DataError: the table cannot be read, or has captions for none of these samples.
    """

    def __init__(self, source: ShardSource, where: Path | str) -> None:
        self._source, self._where, self._table = source, where, CaptionTable.load(where)
        self.fingerprint, self.captions_fingerprint = source.fingerprint, self._table.fingerprint
        self._places = self._table.places(source.manifest.uids())
        known = self._places >= 0
        self.has_captions = known.copy()
        self.has_captions[known] = self._table.num_captions[self._places[known]] > 0
        self.num_unknown, self.num_emptied = int((~known).sum()), int((known & ~self.has_captions).sum())
        if not known.any():
            raise DataError(
                f"table of captions `{where}` was made for other samples",
                got=f"{len(self._table)} rows, none of them with the uid of one of {len(source)} samples",
                allowed="a table of these shards, or of others with the same samples",
                remedy="vlm-train data recaption SHARDS --run RUN --out DIR with these shards",
            )

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        """See `types.Source`."""
        return self._source.shard_starts

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: NDArray[np.int64]) -> list[RawSample | SampleError]:
        """See `ShardSource.read`."""
        places = self._places[np.asarray(rows, np.int64)].tolist()
        return [self._captioned(*each) for each in zip(self._source.read(rows), places, strict=True)]

    def _captioned(self, sample: RawSample | SampleError, place: int) -> RawSample | SampleError:
        captions = self._table.captions(place) if place >= 0 else []
        if isinstance(sample, SampleError):
            return sample
        if not captions:
            return SampleError("no_caption", got=f"none of it in {self._where}")
        try:
            metadata = decode_metadata(sample.parts)
        except SampleError as error:
            return error
        told = {name: value for name, value in metadata.items() if name != "caption"} | {"captions": captions}
        parts = {name: part for name, part in sample.parts.items() if name != "txt"}
        return replace(sample, parts=parts | {"json": to_json(told)})

    def locate(self, row: int) -> tuple[str, str]:
        """See `types.Source`."""
        return self._source.locate(row)

    def expect(self, selection: Selection, shuffle_window: int) -> None:
        """See `ShardSource.expect`."""
        self._source.expect(selection, shuffle_window)

    def narrowed(self, selection: Selection) -> Selection:
        """What of a selection has captions.

        Raises:
            DataError: nothing has.
        """
        kept, content = self.has_captions, selection.content
        manifest, provenance = selection.manifest, selection.provenance
        if isinstance(content, Weights):
            weights = np.where(kept, content.array[: len(kept)] / UNIT, 0.0)
            found = Selection.from_weights(weights, manifest=manifest, provenance=provenance)
        else:
            found = Selection.from_mask(selection.mask() & kept, manifest=manifest, provenance=provenance)
        if not found.content.num_kept():
            raise DataError(
                f"table of captions `{self._where}` leaves nothing to train on",
                got=f"{self.num_emptied} samples without a caption that was good enough, {self.num_unknown} that it "
                "does not know",
                allowed="captions for some of the samples that are selected",
                remedy="make it again with a lower --min-score",
            )
        return found

    def tally(self) -> str:
        """How many samples have captions in the table, and why the others have none, for a person."""
        told = f"{int(self.has_captions.sum())} of {len(self)} samples have captions in {self._where}"
        reasons = [f"{self.num_emptied} were left with none that was good enough"] if self.num_emptied else []
        reasons += [f"{self.num_unknown} are not in it"] if self.num_unknown else []
        return f"{told}; {' and '.join(reasons)}: they are left out" if reasons else told
