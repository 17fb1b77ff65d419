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
from pathlib import Path
from typing import Any

from vlm_train.data.decode import first_image
from vlm_train.data.records import Errors, Record, read_record, records_of
from vlm_train.data.writer import DatasetWriter, Progress, Summary
from vlm_train.errors import DataError

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Split in `dataset_coco.json` to split on disk: by convention one trains on `train` and `restval` together."""


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
    errors: Errors = []
    records = records_of(folder, errors)
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


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise DataError(f"no such {what}", got=str(path), remedy="check the path")
    return path


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
            parts = read_record(record, folder)
            if isinstance(parts, str):
                errors.append({"file": record.file, "reason": parts})
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
        f"none of the {len(records)} images of {folder} could be imported",
        got=reasons or "no image at all",
        allowed="JPEG, PNG or WebP files with a caption each",
        remedy=f"see {out / 'import_errors.jsonl'}",
    )


def _held_out(parts: Mapping[str, bytes], parameters: Mapping[str, Any]) -> bool:
    fraction = parameters.get("val_fraction", 0.0)
    return int.from_bytes(hashlib.sha256(first_image(parts)).digest()[:8], "big") < fraction * 2**64


def _fingerprint(records: Iterable[Record], errors: Errors, folder: Path) -> str:
    """sha256 over what is to be imported: names, captions, fields, and the sizes of the files as they are now."""
    digest = hashlib.sha256()
    for record in records:
        path = folder / record.file
        size = path.stat().st_size if path.is_file() else -1
        digest.update(json.dumps([record.file, size, record.split, record.captions, record.fields]).encode())
    digest.update(json.dumps(errors).encode())
    return digest.hexdigest()
