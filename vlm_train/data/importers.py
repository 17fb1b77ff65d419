"""Brings a user's images and captions into shards: a folder, a table, or the annotation files of COCO.

The bytes of an image are stored as they are. Its format is read from its first bytes, not from its name. A sample's key
is its running number; its old name stays in KEY.json (`file`). Whatever cannot be imported is written with its reason
to `import_errors.jsonl` and counted; when nothing can be, that is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_train.data.tables import TABLES, read_table
from vlm_train.data.writer import DatasetWriter, Progress, Summary, to_json
from vlm_train.errors import DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Split in `dataset_coco.json` to split on disk: by convention one trains on `train` and `restval` together."""


@dataclass(slots=True)
class Record:
    """One image to import: its path below the image folder, its captions, its split, more fields of KEY.json."""

    file: str
    captions: list[str]
    split: str = "train"
    fields: dict[str, Any] = field(default_factory=dict)


Errors = list[dict[str, str]]


def import_folder(
    folder: Path,
    out: Path,
    *,
    val_fraction: float = 0.0,
    max_samples: int = 1000,
    progress: Progress | None = None,
) -> Summary:
    """Imports images with captions.

    Captions come from `captions.csv|json|jsonl|parquet` in the folder with the columns `image` (a path below the
    folder), `caption` and, if wanted, `label` (an integer); several rows of one image give it several captions. Without
    such a table, NAME.txt beside NAME.jpg holds the captions, one a line; subfolders count.

    Args:
        folder: where the images are.
        out: the dataset directory.
        val_fraction: share of the images that go to `val`, by the hash of their bytes (equal images stay together).
        max_samples: samples to a shard.
        progress: called after each image.

    Raises:
        DataError: no such folder, a table without the columns, two tables, or nothing that can be imported.
    """
    folder = _existing(Path(folder), "folder")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        names = [path.name for path in tables]
        raise DataError(f"{folder} has several caption tables", got=names, allowed="one of them")
    errors: Errors = []
    records = _from_table(tables[0], errors) if tables else _from_text_files(folder, errors)
    parameters = {"dataset": "folder", "val_fraction": val_fraction}
    return _write(records, errors, folder, Path(out), parameters, max_samples, progress)


def import_coco(
    annotations_json: Path,
    images_dir: Path,
    out: Path,
    *,
    split: str | None = None,
    max_samples: int = 1000,
    progress: Progress | None = None,
) -> Summary:
    """Imports COCO captions: the official `captions_*.json`, or Karpathy's `dataset_coco.json` (also Flickr30k's).

    Args:
        annotations_json: the annotation file; which kind it is shows in its content.
        images_dir: where the images are, either directly or (Karpathy) in `train2014/` and `val2014/`.
        out: the dataset directory.
        split: for an official file, which has no splits, the split to write to (default `train`); for Karpathy's, the
            only split to take (`train`, `restval`, `val`, `test`; default all, `restval` going to `train`).
        max_samples: samples to a shard.
        progress: called after each image.

    Raises:
        DataError: a file of another format, an unknown split, or no image that can be imported.
    """
    path, images_dir = _existing(Path(annotations_json), "annotation file"), _existing(Path(images_dir), "image folder")
    try:
        document = json.loads(path.read_text("utf-8"))
        karpathy = "sentences" in document["images"][0]
        errors: Errors = []
        if karpathy:
            records = _from_karpathy(document, images_dir, split, errors)
        else:
            records = _from_coco(document, split or "train", errors)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path} is not a COCO caption file",
            got=f"{type(error).__name__}: {error}",
            allowed="captions_train2017.json and its like, or Karpathy's dataset_coco.json",
        ) from error
    return _write(records, errors, images_dir, Path(out), {"dataset": "coco", "split": split}, max_samples, progress)


def image_suffix(content: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes; None for anything else."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise DataError(f"no such {what}", got=str(path), remedy="check the path")
    return path


def _from_text_files(folder: Path, errors: Errors) -> list[Record]:
    records = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS):
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


def _from_coco(document: Mapping[str, Any], split: str, errors: Errors) -> list[Record]:
    licenses = {row["id"]: row["name"] for row in document.get("licenses", [])}
    captions: dict[int, list[str]] = {row["id"]: [] for row in document["images"]}
    for row in document["annotations"]:
        if row["image_id"] in captions:
            captions[row["image_id"]].append(row["caption"])
        else:
            errors.append({"file": str(row["image_id"]), "reason": "unknown_image"})
    records = []
    for row in document["images"]:
        fields = {"image_id": row["id"], "source": "coco", "license": licenses.get(row.get("license"))}
        fields["url"] = row.get("coco_url") or row.get("flickr_url")
        records.append(Record(row["file_name"], captions[row["id"]], split, _known(fields)))
    return records


def _from_karpathy(document: Mapping[str, Any], images_dir: Path, split: str | None, errors: Errors) -> list[Record]:
    if split is not None and split not in KARPATHY_SPLITS:
        raise DataError("unknown split", got=split, allowed=", ".join(KARPATHY_SPLITS))
    records = []
    for row in document["images"]:
        if split not in (None, row["split"]):
            continue
        if row["split"] not in KARPATHY_SPLITS:
            errors.append({"file": row["filename"], "reason": "unknown_split", "detail": row["split"]})
            continue
        nested = f"{row.get('filepath', '.')}/{row['filename']}"
        file = nested if (images_dir / nested).is_file() else row["filename"]
        fields = {"image_id": row.get("cocoid", row.get("imgid")), "source": document.get("dataset", "coco")}
        captions = [sentence["raw"] for sentence in row["sentences"]]
        records.append(Record(file, captions, KARPATHY_SPLITS[row["split"]], _known(fields)))
    return records


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _write(
    records: Sequence[Record],
    errors: Errors,
    folder: Path,
    out: Path,
    parameters: Mapping[str, Any],
    max_samples: int,
    progress: Progress | None,
) -> Summary:
    inputs = _fingerprint(records, errors, folder)
    with DatasetWriter(out, parameters={**parameters, "inputs": inputs}, max_samples=max_samples) as writer:
        if writer.finished is not None:
            return writer.finished
        num_written = 0
        for number, record in enumerate(records):
            content, reason = _read(record, folder)
            if reason is None:
                split = "val" if _held_out(content, parameters) else record.split
                writer.add(split, f"{number:09d}", _parts(record, content))
                num_written += 1
            else:
                errors.append({"file": record.file, "reason": reason})
            if progress is not None:
                progress(number + 1, len(records))
        writer.add_file("import_errors.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in errors))
        reasons = dict(sorted(Counter(row["reason"] for row in errors).items()))
        if num_written:
            return writer.finish(num_errors=len(errors), facts={"errors": reasons})
    raise DataError(
        f"none of the {len(records)} images of {folder} could be imported",
        got=reasons or "no image at all",
        allowed="JPEG, PNG or WebP files with a caption each",
        remedy=f"see {out / 'import_errors.jsonl'}",
    )


def _read(record: Record, folder: Path) -> tuple[bytes, str | None]:
    """The image's bytes, or why there are none to import."""
    if not any(caption.strip() for caption in record.captions):
        return b"", "no_caption"
    if any("\ud800" <= character <= "\udfff" for caption in record.captions for character in caption):
        return b"", "caption_utf8"  # JSON can spell half a surrogate pair
    if Path(record.file).is_absolute() or ".." in Path(record.file).parts:
        return b"", "outside_folder"
    try:
        content = (folder / record.file).read_bytes()
    except FileNotFoundError:
        return b"", "no_image"
    except OSError as error:
        return b"", f"unreadable_{type(error).__name__}"
    return content, None if image_suffix(content) else "image_unknown"


def _parts(record: Record, content: bytes) -> dict[str, bytes]:
    captions = [caption.strip() for caption in record.captions if caption.strip()]
    metadata = {"captions": captions, **record.fields, "file": record.file}
    return {str(image_suffix(content)): content, "txt": captions[0].encode(), "json": to_json(metadata)}


def _held_out(content: bytes, parameters: Mapping[str, Any]) -> bool:
    fraction = parameters.get("val_fraction", 0.0)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < fraction * 2**64


def _fingerprint(records: Iterable[Record], errors: Errors, folder: Path) -> str:
    """sha256 over what is to be imported: names, captions, fields, and the sizes of the files as they are now."""
    digest = hashlib.sha256()
    for record in records:
        path = folder / record.file
        size = path.stat().st_size if path.is_file() else -1
        digest.update(json.dumps([record.file, size, record.split, record.captions, record.fields]).encode())
    digest.update(json.dumps(errors).encode())
    return digest.hexdigest()
