"""A folder of images with a caption table (csv, json, jsonl, parquet) or text files, trained on as it lies there.

Indexing writes what the table says of each sample as one JSON line into the manifest (`ShardIndex.records`); an entry
is the place of that line, and reading is the line, then the image. So a table of any size costs no memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vlm_train.data import decode
from vlm_train.data.decode import SampleError
from vlm_train.data.files import File, Stat
from vlm_train.data.formats.base import Parts, ShardIndex, changed
from vlm_train.data.local import printable
from vlm_train.data.records import Errors, Record, image_files, read_record, records_of, table_of


class TableFormat:
    """One folder.

    Args:
        folder: where the images are.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def stat(self) -> Stat:
        """Size and version of the table, or of all images and texts where there is none."""
        table = table_of(self.folder)
        files = (
            [table] if table else [p for image in image_files(self.folder) for p in (image, image.with_suffix(".txt"))]
        )
        digest, total = hashlib.sha256(), 0
        for path in files:
            try:
                stat = os.stat(path)
            except OSError:  # indexing says of that sample what is wrong
                continue
            total += stat.st_size
            digest.update(os.fsencode(path.relative_to(self.folder)))
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return Stat(size=total, version=digest.hexdigest()[:32])

    def index(self, file: File) -> ShardIndex:
        """See `Format.index`."""
        index, errors, records = ShardIndex(self.folder.name), Errors(), bytearray()
        for number, record in enumerate(records_of(self.folder, errors)):
            parts = read_record(record, self.folder)
            if isinstance(parts, str):
                index.leave_out(record.file, parts)
                continue
            line = json.dumps(dataclasses.asdict(record)).encode() + b"\n"
            sizes = [(name, 0, len(content)) for name, content in parts.items()]
            index.add(parts, key=record.file, number=number, offset=len(records), length=len(line), parts=sizes)
            records += line
        for error in errors:
            if error["reason"] == "bad_label":  # the sample stays, without it
                index.ignored["bad_label"] += 1
            else:
                index.leave_out(error["file"], error["reason"])
        index.records = bytes(records)
        return index

    def read(self, file: File, entries: NDArray[Any]) -> list[Parts | SampleError]:
        """See `Format.read`; `file` is the records that `index` made."""
        lines = file.read_many(list(zip(entries["offset"].tolist(), entries["length"].tolist(), strict=True)))
        return [self._sample(line, uid) for line, uid in zip(lines, entries["uid"].tolist(), strict=True)]

    def _sample(self, line: bytes, uid: bytes) -> Parts | SampleError:
        try:
            record = Record(**json.loads(line))
            parts = read_record(record, self.folder)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # not the line that indexing wrote
            return changed(self.folder.name, error)
        key = printable(record.file)
        if isinstance(parts, str):
            return SampleError(parts, got=key)
        if decode.sample_uid(parts) != uid:
            return changed(self.folder.name, f"`{key}` is not the file that was indexed")
        return key, parts
