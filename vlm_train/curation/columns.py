"""What curation finds of a sample by itself, as further columns of the manifest's parts, so that it is found once.

A column belongs to the sample and to nothing else: not to which others there are, nor to any threshold. Whatever holds
between samples stands in the folder of a selection. A part is written whole or not at all and only by one process at a
time, so a killed command goes on with the parts that it has not written, and any number of workers writes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_train.curation import fingerprints, views
from vlm_train.curation.engines import Engine
from vlm_train.curation.reading import samples_of
from vlm_train.data.decode import SampleError
from vlm_train.data.home import write_whole
from vlm_train.data.indexing import locked
from vlm_train.data.manifest import Manifest, read_part, to_parquet
from vlm_train.errors import DataError

Progress = Callable[[int, int], None]
"""Called with (samples done, in all)."""

_VERSION = b"vlm_train"  # of the values of a column, in the metadata of its field


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns that are found together. `of`: a function of a module, of the parts of a sample to the values by the
    names of the fields; a field that it leaves out, and all of a sample of which it raises SampleError, are null.
    `version`: of the values; those of another are found anew."""

    fields: tuple[pa.Field, ...]
    version: str
    of: Callable[[Mapping[str, bytes]], Mapping[str, Any]]


def _looks(parts: Mapping[str, bytes]) -> Mapping[str, Any]:
    return fingerprints.fingerprint(parts)._asdict()


FINGERPRINT = Columns(
    (
        pa.field("phash", pa.uint64()),
        pa.field("quality", pa.int32()),
        pa.field("thumbnail", pa.binary(views.THUMBNAIL_BYTES)),
        pa.field("thumbnail_hash", pa.uint64()),
        pa.field("views", pa.binary(views.CODES_BYTES)),
    ),
    fingerprints.VERSION,
    _looks,
)
"""The columns of `fingerprints.Fingerprint`; null of a sample without a picture, or of one that does not decode."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A shard whose part lacks columns. `content`: the hash of its rows; `part`: where these stand."""

    shard: str
    content: str
    part: Path
    columns: Columns


def add_columns(manifest: Manifest, columns: Columns, *, engine: Engine, progress: Progress | None = None) -> None:
    """Gives each part of a manifest the columns, where it has them not.

    Args:
        manifest: its shards are read.
        columns: what is found.
        engine: where.
        progress: see `Progress`.

    Raises:
        DataError: a part is damaged or cannot be written, or a shard cannot be had; its parts so far stay.
    """
    facts = list(zip(manifest.shards, manifest.entries_of, manifest.parts, strict=True))
    stale = [
        _Part(shard, entry["content"], part, columns) for shard, entry, part in facts if not has_columns(part, columns)
    ]
    sizes = {shard: entry["num_samples"] for shard, entry, _ in facts}
    done = len(manifest) - sum(sizes[item.shard] for item in stale)
    for item, _ in zip(stale, engine.map(_write, stale), strict=True):
        done += sizes[item.shard]
        if progress is not None:
            progress(done, len(manifest))


def set_column(manifest: Manifest, field: pa.Field, values: Callable[[int, int], pa.Array]) -> None:
    """Puts a column into every part: `values` of (the first row, the row behind the last) of a part.

    Raises:
        DataError: as `add_columns`.
    """
    borders = zip(manifest.starts[:-1].tolist(), manifest.starts[1:].tolist(), strict=True)
    for part, entry, (first, stop) in zip(manifest.parts, manifest.entries_of, borders, strict=True):
        _put(part, entry["content"], {field: values(first, stop)})


def has_columns(part: Path, columns: Columns) -> bool:
    """Whether a part has the columns, in the values of today."""
    try:
        schema = pq.read_schema(part)
    except (OSError, pa.ArrowException):
        return False  # who reads it says what is wrong
    return all(_is_current(schema, field, columns.version) for field in columns.fields)


def _is_current(schema: pa.Schema, field: pa.Field, version: str) -> bool:
    if field.name not in schema.names:
        return False
    found = schema.field(field.name)
    return found.type == field.type and (found.metadata or {}).get(_VERSION) == version.encode()


def _write(item: _Part) -> None:
    """Computes the columns of a part and writes it with them."""
    found: dict[str, list[Any]] = {field.name: [] for field in item.columns.fields}
    for sample in samples_of(item.shard, item.content):
        values = _values(sample, item.columns)
        for name, column in found.items():
            column.append(values.get(name))
    version = {_VERSION: item.columns.version}
    fields = {field.name: field.with_metadata(version) for field in item.columns.fields}
    _put(item.part, item.content, {fields[name]: pa.array(found[name], fields[name].type) for name in fields})


def _put(part: Path, content: str, columns: Mapping[pa.Field, pa.Array]) -> None:
    """Writes a part with these columns behind its own."""
    names = [field.name for field in columns]
    try:
        with locked(part.parent):
            table = read_part(part, content)
            table = table.select([name for name in table.column_names if name not in names])
            for field, values in columns.items():
                table = table.append_column(field, values)
            write_whole(part, to_parquet(table))
    except OSError as error:
        raise DataError(f"`{part}` cannot be written", got=error, allowed="a manifest that can be written",
                        remedy="make room in its folder, or make it writable") from error  # fmt: skip


def _values(sample: Any, columns: Columns) -> Mapping[str, Any]:
    """Empty of a sample that nothing can be said of."""
    try:
        if isinstance(sample, SampleError):
            raise sample
        return columns.of(sample.parts)
    except SampleError:
        return {}
