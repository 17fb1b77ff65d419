"""Rows of a small table, whichever of four formats it comes in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_train.errors import DataError

TABLES = ("captions.csv", "captions.json", "captions.jsonl", "captions.parquet")


def read_table(path: Path, *, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a `.csv` (with a header), `.json` (a list of objects), `.jsonl` or `.parquet` file.

    Raises:
        DataError: the file cannot be read as its ending says, or a row lacks one of `columns`.
    """
    try:
        rows = _rows(path)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}", got=error, allowed="UTF-8 text") from error
    for number, row in enumerate(rows, start=1):
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            got = sorted(row) if isinstance(row, dict) else type(row).__name__
            allowed = f"columns {', '.join(columns)}"
            raise DataError(f"row {number} of {path} lacks {', '.join(missing)}", got=got, allowed=allowed)
    return rows


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text("utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    content = json.loads(text)
    if not isinstance(content, list):
        raise ValueError(f"a {type(content).__name__}, not a list of objects")
    return content
