"""Images in a folder with their captions, in a table or in text files.

It is what `data import folder` turns into tars, and what a folder is read as when it is trained on directly. Both give
the same parts, so they give the same uids. Whatever is wrong with one row or one file costs that row or that file.
"""

from __future__ import annotations

import errno
import io
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from vlm_train.data.decode import SampleError, decode_label, open_image
from vlm_train.data.local import printable, regular
from vlm_train.data.tables import TABLES, Row, read_table
from vlm_train.data.writer import to_json
from vlm_train.errors import DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")

_MAX_BYTES = (1 << 31) - (1 << 12)  # of a file: as in a tar
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # there is no such file, or none can have that name
_INTEGER = re.compile(r"([+-]?[0-9]{1,19})(\.0+)?")  # 4.0: what pandas makes of a column of integers with gaps


@dataclass(slots=True)
class Record:
    """One image to import: its path below the image folder, its captions, its split, more fields of KEY.json; `box`
    [x0, y0, x1, y1] in pixels, where only a part of the picture is meant."""

    file: str
    captions: list[str]
    split: str = "train"
    fields: dict[str, Any] = field(default_factory=dict)
    box: tuple[int, int, int, int] | None = None

    @property
    def name(self) -> str:
        """What a failure calls it."""
        return self.file

    @property
    def more(self) -> Sequence[str]:
        """Paths of further images, which some kinds of record have."""
        return ()


Errors = list[dict[str, str]]


def failure(file: str, reason: str, detail: str = "") -> dict[str, str]:
    """One of `Errors`. `file`: its name, or where it stands or would have stood."""
    facts = {"file": printable(file), "reason": reason}
    return facts | ({"detail": printable(detail)} if detail else {})


def is_name(value: object) -> bool:
    """Whether what a table says may be the name of a file."""
    return isinstance(value, str) and value != "" and "\0" not in value and _is_text(value)


def caption_problem(value: object) -> str | None:
    """Why what a table says is no caption, None where it is one."""
    if not isinstance(value, str):
        return "bad_row"
    return None if _is_text(value) else "caption_utf8"


def _is_text(value: str) -> bool:
    """Not where bytes were no UTF-8, or JSON spells half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def table_of(folder: Path) -> Path | None:
    """The caption table of a folder, None where captions stand in text files.

    Raises:
        DataError: there are several.
    """
    tables = [path for name in TABLES if os.path.lexists(path := folder / name) and not os.path.isdir(path)]
    if len(tables) > 1:
        names = [path.name for path in tables]
        raise DataError(f"{folder} has several caption tables", got=names, allowed="one of them")
    return tables[0] if tables else None


def image_files(folder: Path, errors: Errors | None = None) -> list[Path]:
    """Every image of a folder at any depth, sorted; a folder that cannot be listed is added to `errors`."""
    found, waiting = [], [str(folder)]
    while waiting:
        path = waiting.pop()
        try:
            entries = list(os.scandir(path))
            waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            if errors is not None:
                errors.append(failure(os.path.relpath(path, folder), "unreadable", str(error)))
            continue
        found += [entry.path for entry in entries if PurePath(entry.name).suffix.lower() in IMAGE_ENDINGS]
    return sorted(map(Path, found))


def records_of(folder: Path, errors: Errors) -> list[Record]:
    """What there is to read, in the order of the table or of the names; what cannot be is added to `errors`.

    Raises:
        DataError: several tables, one that cannot be read, or one without the columns `image` and `caption`.
    """
    table = table_of(folder)
    return _from_text_files(folder, errors) if table is None else _from_table(table, errors)


def image_suffix(content: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes; None for anything else."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def read_record(record: Record, folder: Path) -> dict[str, bytes] | str:
    """The parts of the sample (image as it is, or the part of it; txt, json), or the reason why there is none."""
    captions = [caption.strip() for caption in record.captions if caption.strip()]
    if not captions:
        return "no_caption"
    image = read_image(record.file, folder)
    if isinstance(image, str):
        return image
    suffix, content = image
    if record.box is not None:
        cut = _cut(content, record.box)
        if isinstance(cut, str):
            return cut
        suffix, content = "png", cut
    metadata = {"captions": captions, **record.fields, "file": printable(record.file)}
    return {suffix: content, "txt": captions[0].encode(), "json": to_json(metadata)}


def read_image(file: str, folder: Path) -> tuple[str, bytes] | str:
    """(suffix, bytes as they are) of an image below a folder, or the reason why they cannot be had."""
    if Path(file).is_absolute() or ".." in Path(file).parts:
        return "outside_folder"
    content = _content(folder / file, absent="no_image")
    if isinstance(content, str):
        return content
    suffix = image_suffix(content)
    return "image_unknown" if suffix is None else (suffix, content)


def _content(path: Path, *, absent: str) -> bytes | str:
    """The bytes of a file, or the reason why they cannot be had: `absent` where there is no file."""
    try:
        with open(path, "rb", opener=regular) as file:
            if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                return "sample_too_large"
            return file.read()
    except OSError as error:
        return absent if error.errno in _ABSENT else "unreadable"


def _cut(content: bytes, box: tuple[int, int, int, int]) -> bytes | str:
    """A part of a picture as PNG, or the reason why it cannot be had."""
    try:
        pixels = open_image(content).decode()
    except SampleError as error:
        return error.reason
    left, top, right, bottom = (max(0, edge) for edge in box)
    part = pixels[top:bottom, left:right]
    if not part.size:
        return "bad_row"
    stream = io.BytesIO()
    Image.fromarray(part).save(stream, "PNG")
    return stream.getvalue()


def _from_text_files(folder: Path, errors: Errors) -> list[Record]:
    records = []
    for path in image_files(folder, errors):
        name = path.relative_to(folder).as_posix()
        content = _content(path.with_suffix(".txt"), absent="no_caption")
        if isinstance(content, str):
            errors.append(failure(name, content))
            continue
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            errors.append(failure(name, "caption_utf8"))
        else:
            records.append(Record(name, text.split("\n")))
    return records


def _from_table(path: Path, errors: Errors) -> list[Record]:
    records: dict[str, Record] = {}
    disputed: set[str] = set()
    for place, row in read_table(path, columns=("image", "caption"), optional=("label",)):
        where = f"{place} of {path.name}"
        if isinstance(row, str) or not is_name(row["image"]):
            errors.append(_bad_row(row, where))
            continue
        file, caption = row["image"], row["caption"]
        if problem := caption_problem(caption):
            errors.append(failure(file, problem, where))
            continue
        record = records.setdefault(file, Record(file, []))
        record.captions.append(caption)
        if problem := _take_label(record, row.get("label"), disputed):
            errors.append(failure(file, "bad_label", f"{where}: {problem}"))
    return list(records.values())


def _bad_row(row: Row, where: str) -> dict[str, str]:
    detail = row if isinstance(row, str) else f"{reprlib.repr(row['image'])} is no name of a file"
    return failure(where, "bad_row", detail)


def _take_label(record: Record, value: object, disputed: set[str]) -> str | None:
    """Gives the image its label; returns what is wrong with it. Of two labels neither is taken, so that the order of
    the rows does not decide; `disputed`: the images that have lost theirs."""
    if value is None or value == "" or value != value:  # NaN: an empty cell of pandas
        return None
    spelled = isinstance(value, str | float) and _INTEGER.fullmatch(str(value).strip())
    label = decode_label({"label": int(spelled[1]) if spelled else value})
    if label is None:
        return f"{reprlib.repr(value)} is no integer of 64 bits"
    if record.file in disputed or record.fields.setdefault("label", label) == label:
        return None
    disputed.add(record.file)
    return f"{record.fields.pop('label')} in one row, {label} in another"
