"""Brings a user's images and captions into shards: a folder, a table, or the annotation files of COCO.

The bytes of an image are stored as they are. Its format is read from its first bytes, not from its name. A sample's key
is its running number; its old name stays in KEY.json (`file`). Whatever cannot be imported is written with its reason
to `import_errors.jsonl` and counted; when nothing can be, that is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_train.data.decode import first_image, image_parts
from vlm_train.data.local import regular
from vlm_train.data.records import Errors, Record, caption_problem, failure, is_name, read_record, records_of
from vlm_train.data.writer import DatasetWriter, Progress, Summary
from vlm_train.errors import DataError

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Split in `dataset_coco.json` to split on disk: by convention one trains on `train` and `restval` together."""

Kinds = Mapping[str, tuple[type, ...]]
"""Types that the value of a name may have; that of one which is not there is None."""

Read = Callable[[Record, Path], "dict[str, bytes] | str"]
"""(record, image folder) -> the parts of a sample, or the reason why there is none."""

_TEXT, _ID = (str,), (int, str)
_MAYBE_TEXT, _MAYBE_ID = (str, type(None)), (int, str, type(None))
_SPLIT = re.compile(r"\w[\w-]*")


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
    folder = Path(folder)
    if not 0 <= val_fraction <= 1:
        raise DataError("a share of the images", got=val_fraction, allowed="from 0 to 1")
    require(folder, "folder", os.path.isdir)
    errors: Errors = []
    records = records_of(folder, errors)
    parameters = {"dataset": "folder", "val_fraction": val_fraction}
    return write_records(records, errors, folder, Path(out), parameters, max_samples, progress)


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
    path, images_dir = Path(annotations_json), Path(images_dir)
    require(path, "annotation file", os.path.exists)
    require(images_dir, "image folder", os.path.isdir)
    if split is not None and not _SPLIT.fullmatch(split):
        raise DataError("a split that cannot be the name of a folder", got=split, allowed="letters, digits, _ and -")
    errors: Errors = []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", opener=regular) as file:
            document = json.load(file)
        if any("sentences" in row for row in document["images"] if isinstance(row, dict)):
            records = _from_karpathy(document, images_dir, split, errors)
        else:
            records = _from_coco(document, split or "train", errors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a COCO caption file",
            got=f"{type(error).__name__}: {error}",
            allowed="captions_train2017.json and its like, or Karpathy's dataset_coco.json",
        ) from error
    return write_records(
        records, errors, images_dir, Path(out), {"dataset": "coco", "split": split}, max_samples, progress
    )


def require(path: Path, what: str, is_there: Callable[[Path], bool]) -> None:
    """Raises DataError where `what` is not there."""
    if not is_there(path):
        raise DataError(f"no such {what}", got=str(path), allowed="one that is there", remedy="check the path")


def _from_coco(document: Mapping[str, Any], split: str, errors: Errors) -> list[Record]:
    named = typed_rows(document.get("licenses") or [], "licenses", {"id": _ID, "name": _TEXT}, errors)
    licenses = {row["id"]: row["name"] for row in named}
    kinds = {"id": _ID, "file_name": _TEXT, "license": _MAYBE_ID, "coco_url": _MAYBE_TEXT, "flickr_url": _MAYBE_TEXT}
    records: dict[int | str, Record] = {}
    for row in _images(document, kinds, errors):
        if row["id"] in records or not is_name(row["file_name"]):
            detail = "its id came before" if row["id"] in records else "no name of a file"
            errors.append(failure(row["file_name"], "bad_row", detail))
            continue
        fields = {"image_id": row["id"], "source": "coco", "license": licenses.get(row.get("license"))}
        fields["url"] = row.get("coco_url") or row.get("flickr_url")
        records[row["id"]] = Record(row["file_name"], [], split, _known(fields))
    for row in typed_rows(document["annotations"], "annotations", {"image_id": _ID}, errors):
        if row["image_id"] in records:
            _take_caption(records[row["image_id"]], row.get("caption"), errors)
        else:
            errors.append(failure(str(row["image_id"]), "unknown_image"))
    return list(records.values())


def _from_karpathy(document: Mapping[str, Any], images_dir: Path, split: str | None, errors: Errors) -> list[Record]:
    if split is not None and split not in KARPATHY_SPLITS:
        raise DataError("unknown split", got=split, allowed=", ".join(KARPATHY_SPLITS))
    kinds: Kinds = {"filename": _TEXT, "split": _TEXT, "sentences": (list,)}
    kinds = {**kinds, "filepath": _MAYBE_TEXT, "cocoid": _MAYBE_ID, "imgid": _MAYBE_ID}
    source = document.get("dataset")
    source = source if isinstance(source, str) else "coco"
    records = []
    for row in _images(document, kinds, errors):
        if split not in (None, row["split"]):
            continue
        nested = f"{row.get('filepath') or '.'}/{row['filename']}"
        if not is_name(row["filename"]) or not is_name(nested):
            errors.append(failure(row["filename"], "bad_row", "no name of a file"))
            continue
        if row["split"] not in KARPATHY_SPLITS:
            errors.append(failure(row["filename"], "unknown_split", row["split"]))
            continue
        file = nested if os.path.isfile(images_dir / nested) else row["filename"]
        fields = {"image_id": row.get("cocoid", row.get("imgid")), "source": source}
        record = Record(file, [], KARPATHY_SPLITS[row["split"]], _known(fields))
        for sentence in row["sentences"]:
            _take_caption(record, sentence.get("raw") if isinstance(sentence, dict) else None, errors)
        records.append(record)
    return records


def _images(document: Mapping[str, Any], kinds: Kinds, errors: Errors) -> list[dict[str, Any]]:
    images = typed_rows(document["images"], "images", kinds, errors)
    if not images:
        raise ValueError(f"no row of `images` can be used; the first {[error['detail'] for error in errors[:1]]}")
    return images


def typed_rows(rows: object, name: str, kinds: Kinds, errors: Errors) -> list[dict[str, Any]]:
    """The objects of a list whose values are of the given types; what else it holds is added to `errors`."""
    return list(numbered_rows(rows, name, kinds, errors).values())


def numbered_rows(rows: object, name: str, kinds: Kinds, errors: Errors) -> dict[int, dict[str, Any]]:
    """As `typed_rows`, each with its number in the list, from 1 on."""
    if not isinstance(rows, list):
        raise TypeError(f"`{name}` is a {type(rows).__name__}, not a list")
    found = {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict) and all(type(row.get(key)) in types for key, types in kinds.items()):
            found[number] = row
        else:
            errors.append(failure(f"{name} {number}", "bad_row", reprlib.repr(row)))
    return found


def _take_caption(record: Record, caption: object, errors: Errors) -> None:
    if problem := caption_problem(caption):
        errors.append(failure(record.file, problem, reprlib.repr(caption)))
    else:
        record.captions.append(str(caption))


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def write_records(
    records: Sequence[Record],
    errors: Errors,
    folder: Path,
    out: Path,
    parameters: Mapping[str, Any],
    max_samples: int,
    progress: Progress | None,
    read: Read = read_record,
) -> Summary:
    """Writes the dataset, with the parts that `read` makes of a record. Raises DataError when not one record can be
    imported."""
    inputs = _fingerprint(records, errors, folder)
    with DatasetWriter(out, parameters={**parameters, "inputs": inputs}, max_samples=max_samples) as writer:
        if writer.finished is not None:
            return writer.finished
        num_written = 0
        for number, record in enumerate(records):
            parts = read(record, folder)
            if isinstance(parts, str):
                errors.append(failure(record.name, parts))
            else:
                split = "val" if _held_out(parts, parameters) else record.split
                writer.add(split, f"{number:09d}", parts)
                num_written += 1
            if progress is not None:
                progress(number + 1, len(records))
        writer.add_file("import_errors.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in errors))
        reasons = dict(sorted(Counter(row["reason"] for row in errors).items()))
        if num_written:
            return writer.finish(num_errors=len(errors), facts={"errors": reasons})
    raise DataError(
        f"no image of {folder} could be imported",
        got=reasons or "no image at all",
        allowed="JPEG, PNG or WebP files with a caption each",
        remedy=f"see {out / 'import_errors.jsonl'}",
    )


def _held_out(parts: Mapping[str, bytes], parameters: Mapping[str, Any]) -> bool:
    """By the hash of the first image, or of KEY.json where there is none."""
    fraction = parameters.get("val_fraction", 0.0)
    content = first_image(parts) if image_parts(parts) else parts["json"]
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < fraction * 2**64


def _fingerprint(records: Iterable[Record], errors: Errors, folder: Path) -> str:
    """sha256 over what is to be imported: names, captions, fields, and the sizes of the files as they are now."""
    digest = hashlib.sha256()
    for record in records:
        size = _size(folder / record.file)
        more = [[name, _size(folder / name)] for name in record.more]
        digest.update(json.dumps([record.file, size, record.split, record.captions, record.fields, *more]).encode())
    digest.update(json.dumps(errors).encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    """-1 for what is no file."""
    try:
        facts = os.stat(path)
    except OSError:
        return -1
    return facts.st_size if stat.S_ISREG(facts.st_mode) else -1
