"""A selection from a predicate: one SQL expression over the columns of the manifest, true for the rows to keep.

DuckDB evaluates it over the Parquet parts. Only the columns that it names are read, and the answer comes in the order
of the manifest and is packed as it comes, so memory does not grow with the rows but for the result. The expression
judges each row by itself and by nothing else: subqueries, aggregates, window functions, random numbers and the clock
are refused, and no file but the parts can be read. So a selection can be made again from its provenance.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm_train.data.cumulative import Bits, Weights
from vlm_train.data.manifest import damaged
from vlm_train.data.selection import Selection
from vlm_train.errors import ConfigError, DataError, nearest

_BATCH_ROWS = 1 << 17  # few enough that a batch of weights stays in the processor's cache
_ROW_BY_ROW = "an expression that judges each row by itself, such as: width >= 300 AND label IS NOT NULL"
_REFUSED = {
    "SUBQUERY": "a subquery",
    "WINDOW": "a window function",
    "PARAMETER": "a parameter",
    "STAR": "a star",
    "POSITIONAL_REFERENCE": "a column by its number",
}
_CLOCK = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}  # functions without ()
_NUMBERS = re.compile(r"(U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\))")
# an error in the middle of a stream comes through Arrow, and a name that is no text as an error of the binding
_FAILURES = (duckdb.Error, pa.ArrowException, OSError, RuntimeError, UnicodeError)
_OF_A_VALUE = ("Conversion Error", "Out of Range Error")  # not of a part


def select_rows(
    parts: Sequence[Path],
    num_samples: NDArray[np.int64],
    *,
    manifest: str,
    where: str | None = None,
    weight: str | None = None,
) -> Selection:
    """The rows for which a predicate is true, with how the selection came about as its provenance.

    Args:
        parts: the Parquet parts of the manifest, in its order. A column that some of them lack is NULL there.
        num_samples: [num_parts] rows that each must have.
        manifest: fingerprint of the manifest.
        where: SQL, true for the rows to keep; NULL is not true, and counted. None keeps every row.
        weight: SQL, how often a kept row comes in an epoch, 0 to 255.996; NULL is 0, and counted. None: once.

    Raises:
        ConfigError: an expression that SQL does not understand, names no column of the manifest, has the wrong type, or
            depends on more than the row.
        DataError: a part is damaged or has another number of rows, or a weight is out of range.
    """
    expressions = {"where": "true" if where is None else where} | ({} if weight is None else {"weight": weight})
    files = [str(Path(part).absolute()) for part in parts]
    with duckdb.connect(":memory:") as connection:
        _lock(connection, files)
        named = {name for key in expressions for name in _check(connection, expressions, key)}
        try:
            # as if every part had the columns of the first: it saves opening all of them before the first row is read
            query = _Query(connection, files, expressions, num_samples, by_name=False)
            content = query.run()
        except _FAILURES:
            query = _Query(connection, files, expressions, num_samples, by_name=True)
            content = query.run_and_explain()
        columns = {name: kind for name, kind in query.types.items() if name.lower() in named}
    provenance = {
        "where": where,
        "weight": weight,
        "num_dropped": content.num_rows - content.num_kept(),
        "num_null": query.num_null,
        "columns": columns,
        "read_from": sorted({str(Path(file).parent) for file in files}),
        "duckdb": duckdb.__version__,
    }
    return Selection(content, manifest=manifest, provenance=provenance)


@dataclass(slots=True)
class _Query:
    """One evaluation of the expressions over all parts; `by_name`: a column that a part lacks is NULL there. `types`:
    of each column, once it has been run."""

    connection: duckdb.DuckDBPyConnection
    files: list[str]
    expressions: dict[str, str]
    num_samples: NDArray[np.int64]
    by_name: bool
    num_seen: int = 0
    num_null: int = 0
    types: dict[str, str] = field(default_factory=dict)

    def run(self) -> Bits | Weights:
        relation = self._relation(", ".join(f'(\n{text}\n) AS "{key}"' for key, text in self.expressions.items()))
        kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
        if kinds["where"] != "BOOLEAN":
            raise _wrong("where", self.expressions, f"a value of type {kinds['where']}", "true, false or NULL")
        if not _NUMBERS.fullmatch(kinds.get("weight", "FLOAT")):
            raise _wrong("weight", self.expressions, f"a value of type {kinds['weight']}", "a number")
        num_rows = int(self.num_samples.sum())
        if "weight" in self.expressions:
            relation = relation.select('"where", CAST(weight AS DOUBLE)')
            content: Bits | Weights = Weights.pack(self._weights(relation, num_rows), num_rows)
        else:
            content = Bits.pack((kept for kept, _ in self._batches(relation, num_rows)), num_rows)
        if self.num_seen != num_rows:
            raise self._other_rows()
        self.types = self._columns()
        return content

    def run_and_explain(self) -> Bits | Weights:
        """As `run`, with what DuckDB refuses told as an error of ours."""
        try:
            try:
                return self.run()
            except (duckdb.BinderException, duckdb.CatalogException) as error:
                raise self._explain(str(error)) from None
        except _FAILURES as error:
            said = str(error).split("\n")[0]
            damage = None if any(kind in said for kind in _OF_A_VALUE) else self._damaged()
            raise damage or DataError(
                "the selection cannot be evaluated",
                got=said,
                allowed="an expression that can be evaluated for every row",
                remedy="mend the expression; `vlm-train data verify` tells whether the manifest is whole",
            ) from None

    def _columns(self) -> dict[str, str]:
        relation = self._relation("*")
        return dict(zip(relation.columns, map(str, relation.types), strict=True))

    def _relation(self, what: str) -> duckdb.DuckDBPyRelation:
        source = f"read_parquet($files, union_by_name = {self.by_name}, hive_partitioning = false)"
        return self.connection.sql(f"SELECT {what} FROM {source}", params={"files": self.files})

    def _batches(self, relation: duckdb.DuckDBPyRelation, num_rows: int) -> Iterator[tuple[NDArray[np.bool_], Any]]:
        """(kept [n], the Arrow batch of n rows), in order of the rows."""
        for batch in relation.to_arrow_reader(_BATCH_ROWS):
            kept = batch.column(0)
            self.num_seen += len(batch)
            self.num_null += kept.null_count
            if self.num_seen > num_rows:
                raise self._other_rows()
            yield kept.fill_null(False).to_numpy(zero_copy_only=False), batch

    def _weights(self, relation: duckdb.DuckDBPyRelation, num_rows: int) -> Iterator[NDArray[np.float64]]:
        for kept, batch in self._batches(relation, num_rows):
            weights = batch.column(1)
            if weights.null_count:
                self.num_null += int((kept & weights.is_null().to_numpy(zero_copy_only=False)).sum())
            yield np.where(kept, weights.fill_null(0.0).to_numpy(), 0.0)

    def _other_rows(self) -> DataError:
        return self._damaged() or DataError(
            "the manifest changed while the selection was made",
            remedy="make it again once nothing writes to the shards",
        )

    def _damaged(self) -> DataError | None:
        """The error for the first part that cannot be read or has another number of rows, if there is one."""
        for file, expected in zip(self.files, self.num_samples.tolist(), strict=True):
            try:
                with pq.ParquetFile(file, page_checksum_verification=True) as part:
                    names = part.schema_arrow.names  # raises where one is no text
                    found = sum(len(batch) for batch in part.iter_batches(_BATCH_ROWS, columns=names))
            except (OSError, ValueError, pa.ArrowException) as error:
                return damaged(Path(file), error)
            if found != expected:
                return damaged(Path(file), f"{found} rows, not {expected}")
        return None

    def _explain(self, message: str) -> ConfigError:
        found = re.search(r'column "([^"]+)" not found', message)
        key = next((key for key, text in self.expressions.items() if found and found[1] in text), "where")
        if found is None:
            return _wrong(key, self.expressions, message.split("\n")[0], "an SQL expression over the columns")
        columns = self._columns()
        close = nearest(found[1], columns)
        return ConfigError(
            f"`{key}` names no column of the manifest: `{found[1]}`",
            got=self.expressions[key],
            allowed=", ".join(f"{name} ({kind})" for name, kind in columns.items()),
            remedy=f"did you mean `{close[0]}`?" if close else None,
        )


def _lock(connection: duckdb.DuckDBPyConnection, files: list[str]) -> None:
    """Leaves the parts readable and nothing else, for good, and keeps DuckDB from printing."""
    connection.execute("SET enable_progress_bar = false")
    connection.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
    connection.execute("SET preserve_insertion_order = true")
    connection.execute("SET allowed_paths = $files", {"files": files})
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _check(connection: duckdb.DuckDBPyConnection, expressions: dict[str, str], key: str) -> set[str]:
    """The names that an expression may mean columns by, in small letters; refuses what does not judge row by row."""
    tree = _parse(connection, expressions[key])
    if tree["error"]:
        raise _wrong(key, expressions, tree["error_message"], "an SQL expression over the columns of the manifest")
    select, bare = tree["statements"][0]["node"], _parse(connection, "true")["statements"][0]["node"]
    judged, _ = select.pop("select_list"), bare.pop("select_list")
    if len(tree["statements"]) > 1 or len(judged) > 1 or select != bare:
        raise _wrong(key, expressions, "more than one expression", _ROW_BY_ROW)
    nodes = list(_nodes(judged))
    functions = {node["function_name"].lower() for node in nodes if node["class"] == "FUNCTION"}
    names = {name.lower() for node in nodes if node["class"] == "COLUMN_REF" for name in node["column_names"]}
    refused = [_REFUSED[node["class"]] for node in nodes if node["class"] in _REFUSED]
    refused += [f"`{name}`" for name in sorted(functions & _beyond_the_row(connection) | names & _CLOCK)]
    if refused:
        raise _wrong(key, expressions, refused[0], _ROW_BY_ROW)
    return names


def _parse(connection: duckdb.DuckDBPyConnection, text: str) -> dict[str, Any]:
    """DuckDB's syntax tree of one expression in a SELECT, or its error."""
    answer = connection.execute("SELECT json_serialize_sql($sql)", {"sql": f"SELECT (\n{text}\n)"}).fetchall()
    return json.loads(answer[0][0])


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every expression in a syntax tree."""
    if isinstance(tree, dict) and "class" in tree:
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)


def _beyond_the_row(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Functions that look at more than their arguments: aggregates, tables, the clock, random numbers, settings."""
    answer = connection.execute(
        "SELECT function_name FROM duckdb_functions() GROUP BY function_name "
        "HAVING NOT bool_or(function_type = 'macro' OR function_type = 'scalar' AND stability = 'CONSISTENT')"
    )
    return {name for (name,) in answer.fetchall()}


def _wrong(key: str, expressions: dict[str, str], got: str, allowed: str) -> ConfigError:
    return ConfigError(f"`{key}` cannot be used: {expressions[key]}", got=got, allowed=allowed)
