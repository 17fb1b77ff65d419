"""What every kind of shard must be able to do, and what is kept of each of its samples.

A format turns a file into rows (once, when it is indexed) and index entries back into parts (for ever after). Where the
bytes come from is `storage`'s affair, what they mean is `decode`'s, so a new kind of shard is one file beside this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.data import decode
from vlm_train.data.chat import num_images, turns_of
from vlm_train.data.decode import SampleError
from vlm_train.data.files import File
from vlm_train.data.local import printable
from vlm_train.errors import DataError
from vlm_train.locations import shown

ENTRY = np.dtype([("uid", "V16"), ("offset", "<u8"), ("length", "<u4"), ("number", "<u4")])
"""All that reading a sample takes, 32 bytes: its uid, its bytes in the shard, its ordinal in the shard."""

_PART = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEMA = pa.schema(
    [
        ("uid", pa.binary(16)),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("number", pa.uint32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("parts", pa.list_(_PART)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_hash", pa.uint64()),
        ("caption_hash", pa.uint64()),
        ("caption_chars", pa.int32()),
        ("label", pa.int64()),
    ]
)

_FLUSH = 1 << 16  # rows that are held as Python objects at a time

Parts = tuple[str, dict[str, bytes]]
"""(key, content by part name) of one sample."""


class ShardIndex:
    """What indexing a shard found, kept as Arrow and NumPy so that ten million samples fit into memory.

    `num_samples` that can be used; `errors`: {shard, key, reason} of each that is left out; `ignored`: how many members
    of which kind are no part of any sample; `records`: what reading needs beside the file, kept in the manifest.

    Args:
        shard: name of the file.
    """

    def __init__(self, shard: str) -> None:
        self.shard, self.num_samples = printable(shard), 0
        self.errors: list[dict[str, str]] = []
        self.ignored: Counter[str] = Counter()
        self.records: bytes | None = None
        self._tables: list[pa.Table] = []
        self._entries: list[NDArray[Any]] = []
        self._rows = _Rows()

    def add(
        self,
        contents: Mapping[str, bytes],
        *,
        key: str,
        number: int,
        offset: int,
        length: int,
        parts: list[tuple[str, int, int]],
    ) -> None:
        """Describes one sample; one that cannot be used goes to `errors`. `parts`: (name, offset, size) of each."""
        try:
            facts = describe(contents)
        except SampleError as error:
            self.leave_out(key, error.reason)
            return
        facts |= {"shard": self.shard, "key": printable(key), "number": number, "offset": offset, "length": length}
        self._rows.add(facts, parts)
        self.num_samples += 1
        if len(self._rows.ends) > _FLUSH:
            self._flush()

    def leave_out(self, key: str, reason: str) -> None:
        """Records a sample that is not used."""
        self.errors.append({"shard": self.shard, "key": printable(key), "reason": reason})

    def table(self) -> pa.Table:
        """The rows, with the columns of SCHEMA."""
        self._flush()
        return pa.concat_tables(self._tables)

    def entries(self) -> NDArray[Any]:
        """ENTRY [num_samples], in the order of the rows."""
        self._flush()
        return np.concatenate(self._entries)

    def _flush(self) -> None:
        if self._tables and len(self._rows.ends) == 1:
            return
        self._tables.append(self._rows.table())
        self._entries.append(self._rows.entries())
        self._rows = _Rows()


class _Rows:
    """Some rows as Python lists, a list per column; `parts` is flat, row i has those of [ends[i], ends[i + 1])."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if name != "parts"}
        self.parts: tuple[list[str], list[int], list[int]] = ([], [], [])
        self.ends = [0]

    def add(self, facts: Mapping[str, Any], parts: list[tuple[str, int, int]]) -> None:
        for name, column in self.columns.items():
            column.append(facts[name])
        for part in parts:
            for values, value in zip(self.parts, part, strict=True):
                values.append(value)  # type: ignore[attr-defined]
        self.ends.append(len(self.parts[0]))

    def table(self) -> pa.Table:
        flat = [pa.array(values, kind.type) for values, kind in zip(self.parts, _PART, strict=True)]
        parts = pa.ListArray.from_arrays(
            pa.array(self.ends, pa.int32()), pa.StructArray.from_arrays(flat, fields=list(_PART))
        )
        arrays = {name: pa.array(column, SCHEMA.field(name).type) for name, column in self.columns.items()}
        return pa.table([*(arrays.get(name, parts) for name in SCHEMA.names)], schema=SCHEMA)

    def entries(self) -> NDArray[Any]:
        entries = np.empty(len(self.ends) - 1, ENTRY)
        if len(entries):
            entries["uid"] = np.frombuffer(b"".join(self.columns["uid"]), "V16")
        for name in ("offset", "length", "number"):
            entries[name] = self.columns[name]
        return entries


class Format(Protocol):
    """One kind of shard."""

    def index(self, file: File) -> ShardIndex:
        """Every sample of a shard.

        Raises:
            DataError: the file is not what its name says, or cannot be read at random.
            OSError: it cannot be had.
        """

    def read(self, file: File, entries: NDArray[Any]) -> list[Parts | SampleError]:
        """The samples of ENTRY [n], in that order; a sample whose bytes are not what they were is a SampleError.

        Raises:
            OSError: the file cannot be opened, or none of it be read.
        """


def describe(contents: Mapping[str, bytes]) -> dict[str, Any]:
    """uid, width, height, image_hash, caption_hash, caption_chars and label of a sample. Nothing is decoded.

    A sample without an image is one where it has a dialogue that speaks of none, of width and height 0: who reads
    dialogues can use it, and nobody else. An image that such a dialogue misses was lost.

    Raises:
        SampleError: the sample cannot be used.
    """
    width, height = (0, 0) if _only_talks(contents) else _size_of(decode.first_image(contents))
    metadata = decode.decode_metadata(contents)
    captions = decode.decode_captions(contents, metadata)
    uid, image_hash = decode.sample_hashes(contents)
    return {
        "uid": uid,
        "width": width,
        "height": height,
        "image_hash": image_hash,
        "caption_hash": decode.caption_hash(captions[0]),
        "caption_chars": len(captions[0]),
        "label": decode.decode_label(metadata),
    }


def _only_talks(contents: Mapping[str, bytes]) -> bool:
    if decode.image_parts(contents):
        return False
    try:
        metadata = decode.decode_metadata(contents)
        return metadata.get("conversations") is not None and not num_images(turns_of(metadata, ""))
    except SampleError:
        return False


def _size_of(image: bytes) -> tuple[int, int]:
    opened = decode.open_image(image)
    return opened.width, opened.height


def changed(shard: str, detail: object) -> SampleError:
    """The error for bytes that are no longer those that were indexed."""
    return SampleError(
        "shard_changed",
        got=f"{shard}: {detail}",
        allowed="the bytes that the manifest was made from",
        remedy="`vlm-train data index` makes the manifest again; `vlm-train data verify` says whether it is damaged",
    )


def no_usable_sample(location: str, index: ShardIndex) -> DataError:
    """The error for a shard that gives nothing to train on."""
    found = ", ".join(f"{error['key'] or '(start)'}: {error['reason']}" for error in index.errors[:5])
    ignored = ", ".join(f"{count} {kind}" for kind, count in sorted(index.ignored.items()))
    return DataError(
        f"shard `{shown(location)}` holds no usable sample",
        got=found or f"no part of a sample ({ignored or 'empty'})",
        allowed="samples of an image (jpg, png, webp) and a caption (txt, or captions or conversations in json)",
        remedy="remove the shard from the list, or write it again with img2dataset or `vlm-train data import`",
    )
