"""The bytes of FFCV `.beton` files, version 2: their layout, and a writer. Plain Python and NumPy, no ffcv needed.

    header, 24 bytes            version, number of fields, page size, number of samples, where the allocation table is
    fields, 1,041 bytes each    type, name (16 bytes, cut without a word), arguments
    metadata table              a row per sample: numbers themselves, pointers for the rest
    pages                       what the pointers point to; all of one sample lies in one page
    allocation table            (sample, pointer, size) to the end of the file, in any order

All integers are little-endian. A row is a C struct whose 8-byte numbers are aligned and whose images and spans are
packed. The length of a JPEG stands nowhere but in the allocation table; a file that was not finished has no pointer to
it. Source: the writer and reader of FFCV 1.0.2 (Leclerc et al., CVPR 2023), `ffcv/types.py` and `ffcv/fields/*.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.data import beton_sample, decode
from vlm_train.data.decode import SampleError
from vlm_train.data.files import File
from vlm_train.errors import DataError
from vlm_train.locations import shown

VERSION = 2
JPEG, RAW = 0, 1  # modes of an image: encoded, or pixels
INT, IMAGE, BYTES, JSON = 1, 2, 3, 5

_COUNTS = [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8")]
HEADER = np.dtype([*_COUNTS, ("table_start", "<u8")])
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
_IMAGE_ROW = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_SPAN_ROW = np.dtype([("pointer", "<u8"), ("size", "<u8")])
_POINTER, _FLOAT, _INT = np.dtype("<u8"), np.dtype("<f8"), np.dtype("<i8")
_ROWS = {0: _FLOAT, INT: _INT, IMAGE: _IMAGE_ROW, BYTES: _SPAN_ROW, 4: _POINTER, JSON: _SPAN_ROW, 6: _POINTER}

PAGE_SIZE = 8 << 20
_MAX_PAGE_SIZE = 1 << 31  # the largest power of two that the header has room for
_MAX_SIDE = (1 << 16) - 1
_CHUNK = 1 << 16  # rows or allocations that are held at a time


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `place`: its name in `Layout.row`."""

    name: str
    type: int
    place: str


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands before the first row and where the rest is. `head`: the bytes it was read from."""

    head: bytes
    fields: tuple[Field, ...]
    row: np.dtype
    num_samples: int
    rows_start: int
    table_start: int
    file_size: int

    def row_range(self, start: int, stop: int) -> tuple[int, int]:
        """(offset, length) of the rows of samples [start, stop)."""
        return self.rows_start + start * self.row.itemsize, (stop - start) * self.row.itemsize


def read_layout(file: File) -> Layout:
    """Reads the header and the fields; nothing is believed that does not fit into the file.

    Raises:
        DataError: it is no .beton of version 2, is not finished, or is cut off.
        OSError: it cannot be read.
    """
    size = file.stat().size
    raw = file.read(0, HEADER.itemsize)
    if len(raw) < HEADER.itemsize:
        raise unusable(file, f"{size} bytes")
    version, num_fields, _, num_samples, table_start = np.frombuffer(raw, HEADER)[0].tolist()
    if version != VERSION:
        raise unusable(file, f"version {version}")
    if not table_start:
        raise unusable(file, "no allocation table: its writer did not finish")
    rows_start = HEADER.itemsize + num_fields * FIELD.itemsize
    if rows_start > size:
        raise unusable(file, f"{num_fields} fields in {size} bytes")
    head = file.read(0, rows_start)
    fields = _fields(file, head[HEADER.itemsize :])
    row = np.dtype([(field.place, _ROWS[field.type]) for field in fields], align=True)
    rows_end = rows_start + num_samples * row.itemsize
    if num_samples >= 1 << 32 or not rows_end <= table_start <= size:
        raise unusable(file, f"{num_samples} samples and an allocation table at byte {table_start} in {size} bytes")
    if (size - table_start) % ALLOCATION.itemsize:
        raise unusable(file, "an allocation table that is cut off")
    return Layout(head, fields, row, num_samples, rows_start, table_start, size)


def _fields(file: File, raw: bytes) -> tuple[Field, ...]:
    fields = []
    for number, (kind, name, _) in enumerate(np.frombuffer(raw, FIELD).tolist()):
        text = name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
        if kind not in _ROWS:
            raise unusable(file, f"field `{text}` of type {kind}: only its author knows how long its rows are")
        fields.append(Field(text, kind, f"{number}"))
    return tuple(fields)


def unusable(file: File, got: object) -> DataError:
    """The error for a file that gives nothing."""
    return DataError(
        f"`{shown(file.location)}` cannot be read as an FFCV file",
        got=got,
        allowed="a whole .beton of version 2 with fields that FFCV itself defines",
        remedy="copy the file again, or write it again",
    )


def read_rows(file: File, layout: Layout) -> Iterator[NDArray[Any]]:
    """The metadata table in order, in pieces.

    Raises:
        DataError: the file became shorter.
    """
    for start in range(0, layout.num_samples, _CHUNK):
        offset, length = layout.row_range(start, min(start + _CHUNK, layout.num_samples))
        raw = file.read(offset, length)
        if len(raw) < length:
            raise unusable(file, "a metadata table that became shorter")
        yield np.frombuffer(raw, layout.row)


def allocated_sizes(file: File, layout: Layout, pointers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bytes that are allocated at each of `pointers` [n], 0 where nothing is.

    Pointers decide, as in FFCV, not the sample numbers. An empty text shares its pointer with what comes after it, so
    of several sizes the largest counts.
    """
    known = np.unique(pointers)
    sizes = np.zeros(len(known), np.uint64)
    step = _CHUNK * ALLOCATION.itemsize
    for offset in range(layout.table_start, layout.file_size, step):
        raw = file.read(offset, min(step, layout.file_size - offset))
        table = np.frombuffer(raw[: len(raw) // ALLOCATION.itemsize * ALLOCATION.itemsize], ALLOCATION)
        places = np.minimum(np.searchsorted(known, table["pointer"]), max(len(known) - 1, 0))
        mine = known[places] == table["pointer"] if len(known) else np.zeros(len(table), bool)
        np.maximum.at(sizes, places[mine], table["size"][mine])
    return sizes[np.searchsorted(known, pointers)]


class BetonWriter:
    """Writes one `.beton` of the fields `image`, `sample` (JSON, see `beton_sample`) and `label` (-1: none).

    A JPEG that FFCV can decode is stored as it is, byte for byte. FFCV knows neither orientation nor four colours nor
    PNG, so any other image is stored as the pixels that are displayed. Use it in a `with` block: the file appears,
    whole, when the block ends well. Memory: 88 bytes a sample.

    Args:
        path: the file; must not exist.
        num_samples: the most that will be written; a place costs 40 bytes of the file.
        page_size: bytes, a power of two from 2 MiB. It doubles when a sample needs more, up to 2 GiB.
    """

    def __init__(self, path: Path | str, num_samples: int, *, page_size: int = PAGE_SIZE) -> None:
        if not 1 << 21 <= page_size <= _MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise DataError("unfit page size", got=page_size, allowed="a power of two from 2 MiB to 2 GiB")
        self.path, self.page_size, self.num_written = Path(path), page_size, 0
        if self.path.exists():
            raise DataError(f"`{self.path}` is there already", remedy="choose another name, or remove it")
        self._fields = np.zeros(3, FIELD)
        self._fields["type"], self._fields["name"] = (IMAGE, JSON, INT), (b"image", b"sample", b"label")
        row = np.dtype([("image", _IMAGE_ROW), ("sample", _SPAN_ROW), ("label", _INT)], align=True)
        self._rows, self._allocations = np.zeros(num_samples, row), np.zeros((num_samples, 2), ALLOCATION)
        self._end = _align(HEADER.itemsize + self._fields.nbytes + self._rows.nbytes, page_size)
        self._scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = open(self._scratch, "wb", buffering=1 << 20)  # noqa: SIM115

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._scratch.unlink(missing_ok=True)

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Appends a sample.

        Raises:
            SampleError: it does not fit into a .beton or cannot be decoded; nothing was written of it.
            DataError: more samples than were announced.
        """
        if self.num_written == len(self._rows):
            raise DataError(f"more samples than announced for `{self.path}`", allowed=self.num_written)
        name = next(iter(decode.image_parts(parts)), "")
        mode, width, height, content = stored_image(decode.first_image(parts))
        text = beton_sample.pack(key, name, parts)
        label = decode.decode_label(decode.decode_metadata(parts))
        label = -1 if label is None else label
        start = self._place(len(content) + len(text))
        number, text_start = self.num_written, start + len(content)
        self._rows[number] = ((mode, width, height, start), (text_start, len(text)), label)
        self._allocations[number] = [(number, start, len(content)), (number, text_start, len(text))]
        self._file.seek(start)
        self._file.write(content)
        self._file.write(text)
        self._end, self.num_written = text_start + len(text), number + 1

    @property
    def num_pixels(self) -> int:
        """How many images are stored as pixels."""
        return int((self._rows["image"]["mode"][: self.num_written] == RAW).sum())

    def _place(self, size: int) -> int:
        """Where a sample goes so that it lies in one page. Larger pages hold whole smaller ones, so growing is safe."""
        if size > _MAX_PAGE_SIZE:
            raise SampleError("sample_too_large", got=f"{size} bytes", allowed=f"{_MAX_PAGE_SIZE} bytes")
        while size > self.page_size:
            self.page_size *= 2
        fits = self._end % self.page_size + size <= self.page_size
        return self._end if fits else _align(self._end, self.page_size)

    def _finish(self) -> None:
        if not self.num_written:
            raise DataError(f"no sample was written to `{self.path}`")
        header = np.array([(VERSION, len(self._fields), self.page_size, self.num_written, self._end)], HEADER)
        self._file.seek(self._end)
        self._file.write(self._allocations[: self.num_written].tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes() + self._fields.tobytes())
        self._file.write(self._rows.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._scratch, self.path)


def stored_image(data: bytes) -> tuple[int, int, int, bytes]:
    """(mode, width, height, content): the very bytes of a JPEG that FFCV decodes as a viewer would, else the pixels.

    Raises:
        SampleError: the image cannot be decoded (of a JPEG only the header is looked at), or has a side of more than
            65,535 pixels.
    """
    image = decode.open_image(data)
    if max(image.width, image.height) > _MAX_SIDE:
        raise SampleError("image_too_large", got=f"{image.width} x {image.height}", allowed=f"sides of {_MAX_SIDE}")
    if image.pillow is None and not image.raw_start and image.orientation == 1:
        return JPEG, image.width, image.height, data
    return RAW, image.width, image.height, image.decode().tobytes()


def _align(offset: int, size: int) -> int:
    return -(-offset // size) * size
