"""Brings the Visual Genome tests of ARO into shards: a sample for each question, cut to the box that is asked about.

The files are `visual_genome_relation.json` and `visual_genome_attribution.json` of github.com/mertyg/vision-language-
models-are-bows: a list of {image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption, false_caption, and relation_name
or attributes}. KEY.json gets `contrasts` with the relation, or the two attributes, as the type, so that
`evaluation=composition` gives the mean over types that the paper reports.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlm_train.data.importers import require, typed_rows, write_records
from vlm_train.data.local import regular
from vlm_train.data.records import Errors, Record, caption_problem, failure, is_name
from vlm_train.data.writer import Progress, Summary
from vlm_train.errors import DataError

_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
_KINDS: dict[str, tuple[type, ...]] = {
    "image_path": (str,),
    "true_caption": (str,),
    "false_caption": (str,),
    "relation_name": (str, type(None)),
    "attributes": (list, type(None)),
    **dict.fromkeys(_BOX, (int, float)),
}


def import_aro(
    questions_json: Path, images_dir: Path, out: Path, *, max_samples: int = 1000, progress: Progress | None = None
) -> Summary:
    """Imports one of the files to the split `val`.

    Args:
        questions_json: the file.
        images_dir: where the pictures are that it names.
        out: the dataset directory.
        max_samples: samples to a shard.
        progress: called after each question.

    Raises:
        DataError: a file of another format, or no question that can be imported.
    """
    path, images_dir = Path(questions_json), Path(images_dir)
    require(path, "file of questions", os.path.exists)
    require(images_dir, "image folder", os.path.isdir)
    errors: Errors = []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", opener=regular) as file:
            rows = typed_rows(json.load(file), "questions", _KINDS, errors)
        if not rows:
            raise ValueError("no row has the keys of a question")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a file of ARO",
            got=f"{type(error).__name__}: {error}",
            allowed="visual_genome_relation.json or visual_genome_attribution.json",
        ) from error
    found = [_record(row, errors) for row in rows]
    records = [record for record in found if record is not None]
    return write_records(records, errors, images_dir, Path(out), {"dataset": "aro"}, max_samples, progress)


def _record(row: dict[str, Any], errors: Errors) -> Record | None:
    true, false = row["true_caption"], row["false_caption"]
    kind = row.get("relation_name") or " and ".join(map(str, row.get("attributes") or ())) or "unnamed"
    problem = caption_problem(true) or caption_problem(false) or caption_problem(kind)
    left, top, width, height = (row[key] for key in _BOX)
    if problem or not is_name(row["image_path"]) or not all(abs(row[key]) < 1e9 for key in _BOX):
        errors.append(failure(row["image_path"], problem or "bad_row"))
        return None
    fields = {"source": "aro", "contrasts": [{"true": true, "false": false, "type": kind}]}
    box = (int(left), int(top), int(left + width), int(top + height))
    return Record(row["image_path"], [true], "val", {**fields, "box": list(box)}, box)
