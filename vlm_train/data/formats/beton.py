"""FFCV `.beton` files: ours, and any of version 2 with images and texts.

Which field is what goes by type, then by name. The image is the one RGB field, or of several the one named as in
`IMAGES`. The text is the one JSON or bytes field; of several, the caption is the one named as in `CAPTIONS` and the
metadata the JSON one named as in `METADATA`. The label is the integer field named as in `LABELS`. Other fields are
passed over. Where that gives no image, no text, or two of a kind, the error lists them.

A JSON object, in a field of either type, is the sample's KEY.json, a string its KEY.txt, a list of strings `captions`
of KEY.json, other bytes are KEY.txt. The key is `key` of the object, else the number of the sample. An image of pixels
becomes a PPM, which is the same bytes behind a short header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.data import beton, beton_sample, decode
from vlm_train.data.beton import Field, Layout
from vlm_train.data.decode import SampleError
from vlm_train.data.files import File, Range
from vlm_train.data.formats.base import Parts, ShardIndex, changed
from vlm_train.data.formats.beton_texts import texts_of, value_of
from vlm_train.errors import DataError
from vlm_train.locations import shown

IMAGES = ("image", "img", "jpg", "picture")
CAPTIONS = ("caption", "captions", "text", "txt", "title")
METADATA = ("sample", "json", "metadata", "meta", "info")
LABELS = ("label", "labels", "class", "class_id", "target")

_MAX_BYTES = 3 * decode.MAX_PIXELS  # of an image or a text: a JPEG larger than its pixels is not one
_GROUP_BYTES, _GROUP_SAMPLES, _MAX_LAYOUTS = 32 << 20, 4096, 64  # read at once to be indexed; layouts that are kept


@dataclass(frozen=True, slots=True)
class Roles:
    """Which field is what. `texts`: the metadata, the caption, or both in this order."""

    image: Field
    texts: tuple[Field, ...]
    label: Field | None


@dataclass(frozen=True, slots=True)
class _Span:
    """Where one sample lies: `ranges` of its image and of each text. `label` is None where there is none."""

    mode: int
    width: int
    height: int
    label: int | None
    ranges: list[Range]


Found = _Span | SampleError


class BetonFormat:
    """`.beton` shards."""

    def index(self, file: File) -> ShardIndex:
        """See `Format.index`. The entry of a sample is the place of its image; its row tells the rest."""
        layout = beton.read_layout(file)
        roles = roles_of(layout.fields, file)
        pointers = [rows[roles.image.place]["pointer"] for rows in beton.read_rows(file, layout)]
        sizes = beton.allocated_sizes(file, layout, np.concatenate([np.zeros(0, np.uint64), *pointers]))
        index, number, seen = ShardIndex(file.name), 0, set[str]()
        for rows in beton.read_rows(file, layout):
            for group in _groups(_spans(rows, sizes[number : number + len(rows)].tolist(), roles, layout)):
                _add(index, file, roles, number, group, seen)
                number += len(group)
        return index

    def read(self, file: File, entries: NDArray[Any]) -> list[Parts | SampleError]:
        """See `Format.read`. Two requests: the rows of the samples, then their images and texts."""
        try:
            samples = _samples(file, entries, images=True)
        except DataError as error:
            return [changed(file.name, error.got) for _ in entries]
        return [_confirmed(file.name, *pair) for pair in zip(samples, entries["uid"].tolist(), strict=True)]

    def read_texts(self, file: File, entries: NDArray[Any]) -> list[Parts]:
        """The samples of ENTRY [n] without their images, for a loader that has these already; so no uid is checked.

        Raises: DataError where the file is not what was indexed.
        """
        found = list[Parts]()
        for sample in _samples(file, entries, images=False):
            if isinstance(sample, SampleError):
                raise changed(file.name, sample)
            found.append(sample)
        return found


def roles_of(fields: Sequence[Field], file: File) -> Roles:
    """Which field is what, by type, then by name.

    Raises:
        DataError: there is no image or no text, or several of a role.
    """
    texts = [field for field in fields if field.type in (beton.JSON, beton.BYTES)]
    images = [field for field in fields if field.type == beton.IMAGE]
    image = images[0] if len(images) == 1 else _named("image", images, IMAGES, file)
    label = _named("label", [field for field in fields if field.type == beton.INT], LABELS, file)
    if len(texts) > 1:
        objects = [field for field in texts if field.type == beton.JSON]
        found = (_named("metadata", objects, METADATA, file), _named("caption", texts, CAPTIONS, file))
        texts = [field for field in found if field is not None]
    if image is None or not texts:
        raise DataError(
            f"`{shown(file.location)}` has no field that is taken for {'the caption' if image else 'the image'}",
            got=", ".join(f"`{field.name}` (type {field.type})" for field in fields) or "no fields",
            allowed=f"an RGB field and a JSON or bytes field; of several, one named as in {CAPTIONS} or {METADATA}",
        )
    return Roles(image, tuple(texts), label)


def _named(role: str, fields: Sequence[Field], names: Sequence[str], file: File) -> Field | None:
    found = [field for field in fields if field.name.lower() in names]
    if len(found) > 1:
        raise DataError(
            f"`{shown(file.location)}` has several fields for the {role}",
            got=", ".join(f"`{field.name}`" for field in found),
            allowed="one of them",
            remedy="write the file without the others",
        )
    return found[0] if found else None


def _samples(file: File, entries: NDArray[Any], *, images: bool) -> list[Parts | SampleError]:
    numbers = entries["number"].tolist()
    rows, roles, layout = _rows_of(file, numbers)
    spans = list(_spans(rows, entries["length"].tolist(), roles, layout))
    return list(_contents(file, roles, numbers, spans, images=images))


_layouts: dict[str, tuple[Layout, Roles]] = {}


def _rows_of(file: File, numbers: Sequence[int]) -> tuple[NDArray[Any], Roles, Layout]:
    """The rows [n] of samples; zeros where the file has none.

    Raises:
        DataError: the file is no longer a .beton.
    """
    known = _layouts.get(file.location)
    if known is None:
        layout = beton.read_layout(file)
        if len(_layouts) >= _MAX_LAYOUTS:
            _layouts.clear()
        known = _layouts[file.location] = (layout, roles_of(layout.fields, file))
    layout, roles = known
    ranges = [layout.row_range(number, number + 1) if number < layout.num_samples else (0, 0) for number in numbers]
    head, *rows = file.read_many([(0, layout.rows_start), *ranges])
    if head != layout.head:  # another file took its place
        _layouts.pop(file.location, None)
        return _rows_of(file, numbers)
    raw = b"".join(row.ljust(layout.row.itemsize, b"\0") for row in rows)
    return np.frombuffer(raw, layout.row), roles, layout


def _spans(rows: NDArray[Any], sizes: Sequence[int], roles: Roles, layout: Layout) -> Iterator[Found]:
    """Where each sample of `rows` [n] lies, `sizes` [n] being the bytes of the images, or why it cannot be used."""
    images = rows[roles.image.place].tolist()
    texts = zip(*(rows[field.place].tolist() for field in roles.texts), strict=True)
    labels = rows[roles.label.place].tolist() if roles.label else [-1] * len(rows)
    for (mode, width, height, pointer), spans, label, size in zip(images, texts, labels, sizes, strict=True):
        ranges = [(pointer, size), *((start if length else 0, length) for start, length in spans)]
        problem = _problem(mode, width * height, ranges, layout.file_size)
        yield problem or _Span(mode, width, height, label if label >= 0 else None, ranges)


def _problem(mode: int, num_pixels: int, ranges: list[Range], file_size: int) -> SampleError | None:
    if mode not in (beton.JPEG, beton.RAW):
        return SampleError("image_unknown", got=f"mode {mode}", allowed="0 (JPEG) or 1 (pixels)")
    if not (size := ranges[0][1]) or any(start + length > file_size for start, length in ranges):
        return SampleError("bad_pointer", got=ranges, allowed=f"an allocation within {file_size} bytes")
    if any(length > _MAX_BYTES for _, length in ranges):
        return SampleError("sample_too_large", got=ranges, allowed=f"{_MAX_BYTES} bytes")
    if mode == beton.RAW and size != 3 * num_pixels:
        return SampleError("image_truncated", got=f"{size} bytes", allowed=f"{3 * num_pixels} bytes")
    return None


def _groups(spans: Iterator[Found]) -> Iterator[list[Found]]:
    """As many samples in a row as are read at once."""
    group, num_bytes = list[Found](), 0
    for span in spans:
        group.append(span)
        num_bytes += sum(length for _, length in span.ranges) if isinstance(span, _Span) else 0
        if num_bytes >= _GROUP_BYTES or len(group) >= _GROUP_SAMPLES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _add(index: ShardIndex, file: File, roles: Roles, first: int, spans: list[Found], seen: set[str]) -> None:
    """Describes some samples in a row; `first`: the number of the first, `seen`: the keys before it."""
    numbers = range(first, first + len(spans))
    for number, span, sample in zip(numbers, spans, _contents(file, roles, numbers, spans), strict=True):
        if isinstance(sample, SampleError):
            index.leave_out(f"{number:08d}", sample.reason)
            continue
        assert isinstance(span, _Span)
        key, contents = sample
        if key in seen:
            index.leave_out(key, "duplicate_key")
            continue
        seen.add(key)
        image = decode.image_parts(contents)[0]
        places = {name: span.ranges[-1 if name == "txt" else 1] for name in contents} | {image: span.ranges[0]}
        parts = [(name, *place) for name, place in places.items()]
        (offset, length), *_ = span.ranges
        index.add(contents, key=key, number=number, offset=offset, length=length, parts=parts)


def _contents(
    file: File, roles: Roles, numbers: Sequence[int], spans: Sequence[Found], *, images: bool = True
) -> Iterator[Parts | SampleError]:
    """What the samples hold, by one call of `File.read_many`."""
    first = 0 if images else 1
    chunks = iter(file.read_many([item for span in spans if isinstance(span, _Span) for item in span.ranges[first:]]))
    for number, span in zip(numbers, spans, strict=True):
        if isinstance(span, SampleError):
            yield span
            continue
        image = next(chunks) if images else None
        texts = [next(chunks) for _ in roles.texts]
        try:
            yield _parts(f"{number:08d}", span, image, list(map(value_of, roles.texts, texts)))
        except SampleError as error:
            yield error


def _parts(key: str, span: _Span, image: bytes | None, values: Sequence[Any]) -> Parts:
    """Key and parts of one sample from its image, if it is asked for, and what its text fields say.

    Raises:
        SampleError: caption_utf8 or metadata_json.
    """
    try:
        ours = beton_sample.unpack(values[0])
        key, name, texts = ours or (key, "jpg", texts_of(values, span.label))
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise SampleError("caption_utf8", got=error) from None
    if not ours and isinstance(facts := values[0], dict) and isinstance(facts.get("key"), str):
        key = facts["key"]
    key = key.encode("utf-8", "backslashreplace").decode()
    if image is None:
        return key, texts
    if span.mode == beton.RAW:
        return key, {"ppm": b"P6\n%d %d\n255\n" % (span.width, span.height) + image, **texts}
    return key, {name if decode.image_parts({name: b""}) else "jpg": image, **texts}


def _confirmed(shard: str, sample: Parts | SampleError, uid: bytes) -> Parts | SampleError:
    if isinstance(sample, SampleError):
        return changed(shard, sample)
    if decode.sample_uid(sample[1]) == uid:
        return sample
    return changed(shard, f"sample `{sample[0]}` has other content than when it was indexed")
