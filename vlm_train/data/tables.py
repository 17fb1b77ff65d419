"""Rows of a caption table, whichever of four formats it comes in, one after the other.

A bad row costs itself and no other. Bytes that are not UTF-8 come as half surrogate pairs (PEP 383), to be found by who
looks at the text, so they do not end the reading. A table is wrong as a whole when it is not what its ending says, or
when no row has the columns.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_train.data.local import regular
from vlm_train.errors import DataError

TABLES = ("captions.csv", "captions.json", "captions.jsonl", "captions.parquet")

Row = dict[str, Any] | str
"""Values by column; of a row that cannot be read, what is wrong with it."""

_BATCH = 1 << 12  # rows of a Parquet file that are held as Python objects at a time
_SHOWN = 200
_BLANK, _PLAIN = re.compile(r"[ \t\n\r]*"), re.compile(r"[^,\]]*")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{}]', re.DOTALL)


def read_table(path: Path, *, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of a `.csv` (with a header), `.json` (a list of objects), `.jsonl` or `.parquet` file.

    Args:
        path: the file.
        columns: what a row must have; it may have more.
        optional: what else is wanted of it.

    Raises:
        DataError: the file cannot be read as its ending says, or no row has `columns`.
    """
    try:
        if path.suffix == ".csv":
            yield from _csv_rows(path, columns)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(path, columns, optional)
        else:
            yield from _objects(path, columns, _jsonl_rows if path.suffix == ".jsonl" else _json_rows)
    except (OSError, ValueError, csv.Error) as error:
        allowed = "a whole file of that format, its text in UTF-8"
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}", got=error, allowed=allowed) from error


def _check_header(path: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    allowed = f"columns {', '.join(columns)}, each once"
    if missing := [name for name in columns if name not in names]:
        got = ", ".join(names)[:_SHOWN] or "nothing"
        raise DataError(f"the header of {path} lacks {', '.join(missing)}", got=got, allowed=allowed)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{path} has two columns of one name", got=", ".join(twice)[:_SHOWN], allowed=allowed)


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape", opener=regular) as lines:
        reader = csv.reader(lines, strict=True)
        names = next((fields for fields in reader if fields), [])
        _check_header(path, names, columns)
        for line, fields in _records(reader):
            if fields:
                yield f"line {line}", fields if isinstance(fields, str) else _named(names, fields, columns)


def _records(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """(line, fields) of each record of a `csv.reader`. Where quotes are wrong a record may have swallowed lines that
    were records, so each of its lines counts as one that cannot be read."""
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield from ((line, str(error)) for line in range(start, reader.line_num + 1))
        else:
            yield start, fields


def _named(names: Sequence[str], fields: Sequence[str], columns: Sequence[str]) -> Row:
    row = dict(zip(names, fields, strict=False))
    if len(fields) > len(names) or any(name not in row for name in columns):
        return f"{len(fields)} fields for {len(names)} columns"  # a comma in a text without quotes, most often
    return row


def _objects(
    path: Path, columns: Sequence[str], read: Callable[[Path], Iterator[tuple[str, Any]]]
) -> Iterator[tuple[str, Row]]:
    """Rows that are JSON values. That one of them has the columns is made sure before the first is given: else a large
    table of other columns would be a list of as many errors."""

    def judged() -> Iterator[tuple[str, Row]]:
        for place, value in read(path):
            if isinstance(value, dict) and (missing := [name for name in columns if name not in value]):
                value = f"lacks {', '.join(missing)}; has {', '.join(value)[:_SHOWN] or 'nothing'}"
            yield place, value

    first = ""
    for place, row in judged():
        if isinstance(row, dict):
            yield from judged()
            return
        first = first or f"{place}: {row}"
    if first:
        raise DataError(f"no row of {path} has {' and '.join(columns)}", got=first, allowed="an object a row")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, "rb", opener=regular) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            if not text.strip():
                continue
            try:
                row = _object(json.loads(text, object_pairs_hook=_distinct))
            except (ValueError, RecursionError) as error:
                row = str(error)
            yield f"line {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The values of the list one by one, so that one which is nested too deeply, for example, costs itself alone."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="", opener=regular) as file:
        text = file.read()
    place = _past(_BLANK, text, 0)
    if not text.startswith("[", place):
        raise ValueError(f"it begins with {text[place : place + 20]!r}: not a list of objects")
    decoder, number, place = json.JSONDecoder(object_pairs_hook=_distinct), 0, _past(_BLANK, text, place + 1)
    while not text.startswith("]", place):
        if number and not text.startswith(",", place):
            raise ValueError(f"no comma after row {number}")
        place = _past(_BLANK, text, place + 1) if number else place
        try:
            value, place = decoder.raw_decode(text, place)
            row = _object(value)
        except json.JSONDecodeError:  # nobody can know where the next row begins
            raise
        except (ValueError, RecursionError) as error:
            row, place = str(error), _end(text, place)
        number, place = number + 1, _past(_BLANK, text, place)
        yield f"row {number}", row
    if _past(_BLANK, text, place + 1) < len(text):
        raise ValueError(f"more than one value: the list ends after row {number}")


def _object(value: Any) -> Row:
    return value if isinstance(value, dict) else f"a {type(value).__name__}, not an object"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # which of two captions is meant?
        raise ValueError("an object has a name twice")
    return found


def _past(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


def _end(text: str, place: int) -> int:
    """Where the JSON value that begins at `place` ends, by its brackets alone: that takes no recursion."""
    if text[place] not in "[{":
        return _past(_PLAIN, text, place)
    depth = 0
    for token in _TOKEN.finditer(text, place):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        elif token[1] == "":
            break
        if not depth:
            return token.end()
    raise ValueError(f"the value at character {place} does not end")


def _parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb", opener=regular) as stream, pq.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            _check_header(path, names, columns)
            wanted = [name for name in names if name in (*columns, *optional)]
            rows = itertools.chain.from_iterable(map(_rows_of, file.iter_batches(_BATCH, columns=wanted)))
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except pa.ArrowException as error:
        raise ValueError(error) from error


def _rows_of(batch: Any) -> Iterator[Row]:
    columns = map(_values, batch.columns)
    return (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))


def _values(column: Any) -> list[Any]:
    """A column as Python objects. A value that is no text, number or truth value becomes a list that names its type."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return list(column.to_pylist())
    return [[str(kind)] if there else None for there in column.is_valid().to_pylist()]
