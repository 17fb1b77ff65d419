import contextlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_train.data.select import select_rows
from vlm_train.data.selection import Selection
from vlm_train.errors import ConfigError, DataError

SIZES = (700, 0, 1, 3000, 130)


def table_of(num_rows, seed, *, score=True):
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 4, num_rows)
    columns = {
        "uid": pa.array([draw.bytes(16) for _ in range(num_rows)], pa.binary(16)),
        "key": pa.array([f"{seed}-{row}" for row in range(num_rows)], pa.string()),
        "width": pa.array(draw.integers(200, 800, num_rows), pa.int32()),
        "height": pa.array(draw.integers(200, 800, num_rows), pa.int32()),
        "label": pa.array([None if value == 3 else int(value) for value in label], pa.int64()),
    }
    if score:
        columns["score"] = pa.array(draw.normal(0.28, 0.1, num_rows), pa.float32())
    return pa.table(columns)


def write(folder, tables):
    folder.mkdir(exist_ok=True)
    parts = [folder / f"{number:05d}.parquet" for number in range(len(tables))]
    for part, table in zip(parts, tables, strict=True):
        pq.write_table(table, part, row_group_size=500)
    return parts, np.array([len(table) for table in tables]), pa.concat_tables(tables, promote_options="default")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Parts of unequal sizes, one of them empty, in a folder whose name looks like a glob."""
    return write(tmp_path_factory.mktemp("m") / "[a-c] * {x}", [table_of(size, i) for i, size in enumerate(SIZES)])


def select(manifest, where=None, weight=None):
    return select_rows(manifest[0], manifest[1], manifest="abc", where=where, weight=weight)


def columns(manifest):
    table = manifest[2].to_pydict()
    return {name: np.array([np.nan if v is None else v for v in table[name]]) for name in ("width", "label", "score")}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(150, 850), score=st.floats(0, 0.5, width=32), either=st.booleans())
def test_rows_are_those_of_the_predicate_in_their_order(manifest, width, score, either):
    word = "OR" if either else "AND"
    selection = select(manifest, f"width >= {width} {word} score > {score!r}::FLOAT")
    c = columns(manifest)
    tests = (c["width"] >= width, c["score"].astype(np.float32) > np.float32(score))
    assert np.array_equal(selection.mask(), tests[0] | tests[1] if either else tests[0] & tests[1])


def test_null_is_not_kept_and_is_counted(manifest):
    selection = select(manifest, "label < 2")
    label = columns(manifest)["label"]
    assert np.array_equal(selection.mask(), label < 2)
    assert selection.provenance["num_null"] == np.isnan(label).sum() > 0
    assert selection.provenance["num_dropped"] == (~(label < 2)).sum()
    assert len(select(manifest, "label IS NULL")) == np.isnan(label).sum()


def test_weights_are_those_of_the_expression(manifest):
    selection, c = (
        select(manifest, "width >= 300", "CASE WHEN score > 0.3 THEN 2 ELSE label / 2 END"),
        columns(manifest),
    )
    weights = np.where(c["score"] > np.float32(0.3), 2, c["label"] / 2)
    kept = c["width"] >= 300
    expected = Selection.from_weights(np.where(kept, np.nan_to_num(weights), 0))
    assert selection.fingerprint == expected.fingerprint and len(selection) == len(expected) > 0
    assert selection.provenance["num_null"] == (kept & np.isnan(weights)).sum() > 0
    assert select(manifest, None, "1.5").fingerprint == Selection.from_weights(np.full(sum(SIZES), 1.5)).fingerprint


def test_a_weight_matters_only_where_the_row_is_kept(manifest):
    assert len(select(manifest, "width >= 300", "CASE WHEN width < 300 THEN -1 ELSE 1 END"))
    with pytest.raises(DataError, match="cannot be a repeat weight"):
        select(manifest, "width >= 299", "CASE WHEN width < 300 THEN -1 ELSE 1 END")


def test_the_provenance_tells_how_to_make_it_again(manifest, tmp_path):
    made = select(manifest, "Width >= 300 -- not narrow", 'abs(score) * 2 + "label" * 0')
    made.save(tmp_path)
    read = Selection.load(tmp_path, "abc")
    facts = read.provenance
    again = select(manifest, facts["where"], facts["weight"])
    assert again.fingerprint == read.fingerprint and again.provenance == facts == made.provenance
    assert facts["columns"] == {"width": "INTEGER", "score": "FLOAT", "label": "BIGINT"}
    assert facts["read_from"] == [str(manifest[0][0].parent)]


def test_only_the_columns_that_are_named_are_read(manifest, tmp_path):
    """A part whose other columns are overwritten with noise still answers."""
    table = table_of(2000, 9)
    parts, sizes, _ = write(tmp_path, [table])
    whole = select((parts, sizes), "width >= 300").fingerprint
    damaged = bytearray(parts[0].read_bytes())
    metadata = pq.read_metadata(parts[0])
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            if column.path_in_schema != "width":
                damaged[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    parts[0].write_bytes(damaged)
    assert select((parts, sizes), "width >= 300").fingerprint == whole
    with pytest.raises(DataError, match=r"00000\.parquet(.|\n)*remove it"):
        select((parts, sizes), "height >= 300")


@pytest.mark.parametrize("first", [True, False])
def test_a_column_that_some_parts_lack_is_null_there(tmp_path, first):
    """As when curation has got half-way: whichever part has the column."""
    manifest = write(tmp_path, [table_of(900, 0, score=first), table_of(800, 1, score=not first)])
    selection = select(manifest, "score > 0.3 AND width > 0")
    assert np.array_equal(selection.mask(), np.nan_to_num(columns(manifest)["score"]) > np.float32(0.3))
    assert selection.provenance["num_null"] == (800 if first else 900)


@pytest.mark.parametrize("key", ["where", "weight"])
def test_a_misspelt_column_is_answered_with_the_nearest(manifest, key):
    with pytest.raises(ConfigError, match="names no column of the manifest: `widht`") as caught:
        select(manifest, **{key: "widht >= 300"})
    assert caught.value.remedy == "did you mean `width`?"
    assert "height (INTEGER)" in caught.value.allowed and "score (FLOAT)" in caught.value.allowed


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("width >=", "syntax error"),
        ("", "type TUPLE"),
        ("width", "type INTEGER"),
        ("'yes'", "type VARCHAR"),
        ("width > 3, true", "type TUPLE"),
        ("wdth(width) > 3", "wdth does not exist"),
        ("width > 3) FROM x WHERE (true", "more than one expression"),
        ("true), (false", "more than one expression"),
        ("true); SELECT (true", "more than one expression"),
        ("true) LIMIT (3", "more than one expression"),
        ("width > (SELECT 3)", "a subquery"),
        ("EXISTS (SELECT * FROM read_text('/etc/passwd'))", "a subquery"),
        ("row_number() OVER () < 5", "a window function"),
        ("count(*) > 3", "`count_star`"),
        ("max(width) > 3", "`max`"),
        ("random() < 0.5", "`random`"),
        ("now() > TIMESTAMP '2020-01-01'", "`now`"),
        ("current_date > DATE '2020-01-01'", "`current_date`"),
        ("unnest([true, false])", "`unnest`"),
        ("width > $files", "a parameter"),
        ("width > ?", "a parameter"),
        ("*", "a star"),
        ("COLUMNS('width') > 3", "a star"),
        ("#1 > 3", "a column by its number"),
    ],
)
def test_what_is_no_predicate_of_a_row_is_refused(manifest, where, message):
    with pytest.raises(ConfigError, match=message):
        select(manifest, where)


def test_a_weight_must_be_a_number(manifest):
    with pytest.raises(ConfigError, match=r"`weight` cannot be used(.|\n)*type VARCHAR"):
        select(manifest, None, "key")
    with pytest.raises(ConfigError, match=r"`weight` cannot be used(.|\n)*type BOOLEAN"):
        select(manifest, None, "width > 3")
    for kind in ("UTINYINT", "BIGINT", "HUGEINT", "DECIMAL(9, 2)", "DOUBLE"):
        assert len(select(manifest, None, f"1::{kind}")) == sum(SIZES)


def test_hashes_draw_a_share_that_stays(manifest):
    tenth = select(manifest, "hash(uid) % 10 = 0")
    assert tenth.fingerprint == select(manifest, "hash(uid) % 10 = 0").fingerprint
    assert abs(len(tenth) - sum(SIZES) / 10) < 80  # four standard deviations


@pytest.mark.parametrize("change", [-1, 1])
def test_a_part_of_another_length_is_refused_by_name(manifest, change):
    parts, sizes, _ = manifest
    wrong = sizes.copy()
    wrong[3] += change
    with pytest.raises(DataError, match=r"00003\.parquet(.|\n)*3000 rows"):
        select((parts, wrong), "width > 0")


def test_a_part_that_is_gone_or_no_parquet_is_refused(manifest, tmp_path):
    parts, sizes, _ = write(tmp_path, [table_of(10, 0), table_of(10, 1)])
    parts[1].write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"00001\.parquet(.|\n)*remove it"):
        select((parts, sizes), "width > 0")
    parts[1].unlink()
    with pytest.raises(DataError, match=r"00001\.parquet(.|\n)*remove it"):
        select((parts, sizes), "width > 0")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 30), value=st.integers(0, 255))
def test_a_damaged_part_gives_no_error_but_ours(tmp_path, place, value):
    """Names of columns stand in the last bytes: one that is no text is an error of another kind to DuckDB."""
    parts, sizes, _ = write(tmp_path, [table_of(10, 0)])
    damaged = bytearray(parts[0].read_bytes())
    damaged[-9 - place % (len(damaged) - 9)] = value
    parts[0].write_bytes(damaged)
    with contextlib.suppress(DataError, ConfigError):
        assert select((parts, sizes), "width > 0 AND label = 1").num_rows == 10


def test_a_name_of_a_column_that_is_no_text_is_damage(tmp_path):
    parts, sizes, _ = write(tmp_path, [table_of(10, 0)])
    content = parts[0].read_bytes()
    for name in (b"width", b"height"):  # one that is asked for, and another
        parts[0].write_bytes(content.replace(name, b"\xf3" * len(name)))
        with pytest.raises(DataError, match=r"00000\.parquet"):
            select((parts, sizes), "width > 0")


def test_an_error_of_one_value_is_told(manifest):
    with pytest.raises(DataError, match=r"cannot be evaluated(.|\n)*'[0-4]-[0-9]+' to INT32"):
        select(manifest, "CAST(key AS INTEGER) > 3")
