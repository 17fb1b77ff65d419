"""Images in a folder with their captions, in a table or in text files.

It is what `data import folder` turns into tars, and what a folder is read as when it is trained on directly. Both give
the same parts, so they give the same uids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_train.data.tables import TABLES, read_table
from vlm_train.data.writer import to_json
from vlm_train.errors import DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(slots=True)
class Record:
    """One image to import: its path below the image folder, its captions, its split, more fields of KEY.json."""

    file: str
    captions: list[str]
    split: str = "train"
    fields: dict[str, Any] = field(default_factory=dict)


Errors = list[dict[str, str]]


def table_of(folder: Path) -> Path | None:
    """The caption table of a folder, None where captions stand in text files.

    Raises:
        DataError: there are several.
    """
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        names = [path.name for path in tables]
        raise DataError(f"{folder} has several caption tables", got=names, allowed="one of them")
    return tables[0] if tables else None


def image_files(folder: Path) -> list[Path]:
    """Every image of a folder at any depth, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)


def records_of(folder: Path, errors: Errors) -> list[Record]:
    """What there is to read, in the order of the table or of the names; what cannot be is added to `errors`.

    Raises:
        DataError: several tables, or one without the columns `image` and `caption`.
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
    """The parts of the sample (image as it is, txt, json), or the reason why there is none."""
    captions = [caption.strip() for caption in record.captions if caption.strip()]
    if not captions:
        return "no_caption"
    if any("\ud800" <= character <= "\udfff" for caption in captions for character in caption):
        return "caption_utf8"  # JSON can spell half a surrogate pair
    if Path(record.file).is_absolute() or ".." in Path(record.file).parts:
        return "outside_folder"
    try:
        content = (folder / record.file).read_bytes()
    except FileNotFoundError:
        return "no_image"
    except OSError:
        return "unreadable"
    suffix = image_suffix(content)
    if suffix is None:
        return "image_unknown"
    metadata = {"captions": captions, **record.fields, "file": record.file}
    return {suffix: content, "txt": captions[0].encode(), "json": to_json(metadata)}


def _from_text_files(folder: Path, errors: Errors) -> list[Record]:
    records = []
    for path in image_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            lines = path.with_suffix(".txt").read_text("utf-8-sig").split("\n")
        except FileNotFoundError:
            errors.append({"file": name, "reason": "no_caption"})
        except UnicodeDecodeError:
            errors.append({"file": name, "reason": "caption_utf8"})
        else:
            records.append(Record(name, lines))
    return records


def _from_table(path: Path, errors: Errors) -> list[Record]:
    records: dict[str, Record] = {}
    for number, row in enumerate(read_table(path, columns=("image", "caption")), start=1):
        file, caption, label = row["image"], row["caption"], row.get("label")
        if not isinstance(file, str) or not isinstance(caption, str) or not file:
            errors.append({"file": str(file), "reason": "bad_row", "detail": f"row {number} of {path.name}"})
            continue
        record = records.setdefault(file, Record(file, []))
        record.captions.append(caption)
        if label not in (None, ""):
            try:
                record.fields["label"] = int(label)
            except (TypeError, ValueError):
                errors.append({"file": file, "reason": "bad_label", "detail": f"row {number}: {label!r} is no integer"})
    return list(records.values())
