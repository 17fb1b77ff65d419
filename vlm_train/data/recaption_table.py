"""Captions that lie beside the shards: a table by uid, as `vlm-train data recaption` writes it and training reads it.

A table is a folder of Parquet parts with `provenance.json`, or one Parquet file that anything else has written. Its
rows are known by the uid of the manifest (`decode.sample_hashes`), which names the content of a sample: so a table
belongs to samples, wherever their shards lie and however they are cut.

    uid             16 bytes, each once
    captions        list of texts; none where the filter left none
    caption_source  list of texts: for each caption `original`, or the model that wrote it with the hash of its weights
    caption_scores  list of numbers: how well each fits the picture (cosine, -1..1); null where nothing was scored

Training needs the first two columns. It holds the texts in memory, once in each rank: its workers share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.data import row_folder
from vlm_train.data.home import write_whole
from vlm_train.data.manifest import to_parquet
from vlm_train.errors import DataError

ORIGINAL = "original"
"""`caption_source` of a caption that the sample had."""

VERSION = 1
SCHEMA = pa.schema(
    [
        ("uid", pa.binary(16)),
        ("captions", pa.list_(pa.string())),
        ("caption_source", pa.list_(pa.string())),
        ("caption_scores", pa.list_(pa.float32())),
    ]
)

_FACTS = b"vlm_train"  # under which a part tells its facts
_TEXTS = pa.large_list(pa.large_string())  # offsets of 64 bits: all texts of a table may be more than 2 GB


class Caption(NamedTuple):
    """A caption, who wrote it, and how well it fits its picture, where that was asked."""

    text: str
    source: str
    score: float | None = None


class CaptionTable:
    """Captions by uid.

    Args:
        uids: bytes [N] of 16 each, as numpy has them (`S16`).
        captions: a list of texts for each.
        fingerprint: what tells this content, hex.

    Raises:
        ValueError: a uid comes twice.
    """

    def __init__(self, uids: NDArray[np.bytes_], captions: pa.Array, fingerprint: str) -> None:
        self._order = np.argsort(uids, kind="stable")
        self._sorted, self._captions, self.fingerprint = uids[self._order], captions, fingerprint
        if (self._sorted[1:] == self._sorted[:-1]).any():
            raise ValueError("two rows of one uid: which captions are meant?")
        self.num_captions: NDArray[np.int64] = captions.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        return len(self._sorted)

    @classmethod
    def load(cls, where: Path | str) -> CaptionTable:
        """The table in a folder or a Parquet file.

        Raises:
            DataError: it is missing, damaged, unfinished, or no table of captions.
        """
        path = Path(where)
        if not path.is_dir():
            return _loaded(path, [path], [None])
        contents = "the Parquet parts that it names, as `vlm-train data recaption` writes them"
        listed: list[dict[str, Any]] = row_folder.load(
            path, what="table of captions", contents=contents, version=VERSION, make=lambda facts: facts["parts"]
        )
        return _loaded(path, [path / part["file"] for part in listed], [part["sha256"] for part in listed])

    def places(self, uids: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The row of each of `uids` [n, 16], -1 where there is none."""
        wanted = np.ascontiguousarray(uids).view("S16").reshape(-1)
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        found = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        return np.where(self._sorted[found] == wanted, self._order[found], -1)

    def captions(self, place: int) -> list[str]:
        """Of one row."""
        return self._captions[place].as_py() or []


def _loaded(where: Path, files: Sequence[Path], hashes: Sequence[str | None]) -> CaptionTable:
    try:
        read = [_read(file, sha256) for file, sha256 in zip(files, hashes, strict=True)]
        table = pa.concat_tables([part for part, _ in read])
        if table["uid"].null_count:
            raise ValueError("a row without a uid")
        packed = b"".join(table["uid"].to_pylist())
        captions = pa.chunked_array(table["captions"].chunks, _TEXTS).combine_chunks()
        fingerprint = hashlib.sha256("".join(sha256 for _, sha256 in read).encode()).hexdigest()
        return CaptionTable(np.frombuffer(packed, "S16"), captions, fingerprint)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"table of captions `{where}` cannot be read",
            got=error,
            allowed="a folder that `vlm-train data recaption` has finished, or a Parquet file with the columns uid (16 "
            "bytes, each once) and captions (lists of texts)",
            remedy="vlm-train data recaption SHARDS --run RUN --out DIR",
        ) from None


def _read(file: Path, sha256: str | None) -> tuple[pa.Table, str]:
    """The two columns of a file, and its hash. Raises ValueError where it is another than the one that is known."""
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(f"{file.name} is not what was written")
    table = pq.read_table(pa.BufferReader(content), columns=["uid", "captions"])
    columns = [table["uid"].cast(pa.binary(16)), table["captions"].cast(_TEXTS)]
    return pa.table(columns, names=["uid", "captions"]), found


def part_name(number: int) -> str:
    """The file of a part."""
    return f"part-{number:05d}.parquet"


def write_part(path: Path, rows: Sequence[tuple[bytes, Sequence[Caption]]], facts: dict[str, Any]) -> None:
    """Writes rows of (uid, captions), whole or not at all; `facts`, plain JSON, travel in the file."""
    scored = [
        None if any(each.score is None for each in found) else [each.score for each in found] for _, found in rows
    ]
    columns: list[Any] = [
        [uid for uid, _ in rows],
        [[each.text for each in found] for _, found in rows],
        [[each.source for each in found] for _, found in rows],
        scored,
    ]
    told = SCHEMA.with_metadata({_FACTS: json.dumps(facts, sort_keys=True).encode()})
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    write_whole(path, to_parquet(pa.table(arrays, schema=told)))


def facts_of(path: Path) -> dict[str, Any] | None:
    """The facts of a part that `write_part` has finished; None where there is none."""
    try:
        found: dict[str, Any] = json.loads(pq.read_schema(path).metadata[_FACTS])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return found
