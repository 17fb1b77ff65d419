"""A row that cannot be used costs itself alone; a table that is none is named, with what is wrong with it."""

from __future__ import annotations

import csv
import io
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data import tables
from vlm_train.data.importers import import_folder
from vlm_train.data.records import records_of
from vlm_train.data.tables import read_table
from vlm_train.errors import DataError

COLUMNS = ("image", "caption")
GOOD = [("a.png", "one"), ("b.png", "two")]
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "x" * 131_073
GOOD_JSONL = "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in GOOD)
GOOD_JSON = ",".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in GOOD)
GOOD_CSV = "image,caption\na.png,one\nb.png,two\n"


def written(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(folder):
    """(captions by image, (file, reason) of each failure)."""
    errors = []
    records = records_of(folder, errors)
    for error in errors:
        json.dumps(error, ensure_ascii=False).encode()  # it will be written
    return {r.file: r.captions for r in records}, [(error["file"], error["reason"]) for error in errors]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("captions.csv", "file,text\nx.jpg,hello\n", "lacks image, caption"),
        ("captions.csv", "img,caption\nx.jpg,hello,world\n", "header .* lacks image"),
        ("captions.csv", "image,caption,caption\nx.jpg,hello,world\n", "two columns of one name"),
        ("captions.csv", "", "lacks image, caption"),
        ("captions.csv", "image,caption\nx.jpg,hello\n".encode("utf-16"), "lacks image, caption"),
        ("captions.csv", 'image,caption,"\nx.jpg,hello\n', "cannot be read as csv"),
        ("captions.json", "{}", "not a list"),
        ("captions.json", "", "not a list"),
        ("captions.json", "[1]", "no row .* has image and caption"),
        ("captions.json", '[{"image": "a.png", "text": "x"}]', "no row .* has image and caption"),
        ("captions.json", f"[{GOOD_JSON}", "cannot be read as json"),
        ("captions.json", f"[{GOOD_JSON}] 1", "cannot be read as json"),
        ("captions.json", f"[{GOOD_JSON},]", "cannot be read as json"),
        ("captions.json", f"[{GOOD_JSON} {GOOD_JSON}]", "cannot be read as json"),
        ("captions.json", f"[{GOOD_JSON}, {'[' * 100_000}", "cannot be read as json"),
        ("captions.jsonl", "{broken\n", "no row .* has image and caption"),
        ("captions.jsonl", '{"file": "a.png", "caption": "x"}\n' * 3, "no row .* has image and caption"),
        ("captions.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_a_table_that_is_none_is_an_error(tmp_path, name, content, match):
    with pytest.raises(DataError, match=match):
        import_folder(written(tmp_path / "in", name, content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


ROW = '{"image": "c.png", "caption": "x"'
BAD_ROWS = [
    ("csv", "c.png,hello, world\n", ["line 4 bad_row"]),
    ("csv", "c.png\n", ["line 4 bad_row"]),
    ("csv", f"c.png,{LONG}\n", ["line 4 bad_row"]),
    ("csv", 'c.png,"quoted" not\n', ["line 4 bad_row"]),
    ("csv", 'c.png,"swallows\nd.png,x\n\ne.png,y\n', [f"line {number} bad_row" for number in (4, 5, 6, 7)]),
    ("csv", 'c.png,"swallows\nd.png,"x"\n', ["line 4 bad_row", "line 5 bad_row"]),
    ("csv", b"c.png,caf\xe9\n", ["c.png caption_utf8"]),
    ("csv", b"\xe9.png,cafe\n", ["line 4 bad_row"]),
    ("csv", "c\0.png,x\n", ["line 4 bad_row"]),
    ("csv", ",x\n", ["line 4 bad_row"]),
    ("jsonl", '\n{"image": "c.png"}', ["line 4 bad_row"]),
    ("jsonl", '{"image": "c.png", ', ["line 3 bad_row"]),
    ("jsonl", "5\n[1]\n", ["line 3 bad_row", "line 4 bad_row"]),
    ("jsonl", DEEP, ["line 3 bad_row"]),
    ("jsonl", "[" * 100_000, ["line 3 bad_row"]),
    ("jsonl", f'{ROW}, "n": {"9" * 5000}}}', ["line 3 bad_row"]),
    ("jsonl", '{"image": "c\\u0000.png", "caption": "x"}', ["line 3 bad_row"]),
    ("jsonl", '{"image": "\\ud800.png", "caption": "x"}', ["line 3 bad_row"]),
    ("jsonl", '{"image": 5, "caption": "x"}', ["line 3 bad_row"]),
    ("jsonl", '{"image": "c.png", "caption": null}', ["c.png bad_row"]),
    ("jsonl", f'{ROW}, "caption": "y"}}', ["line 3 bad_row"]),
    ("jsonl", '{"image": "a.png", "caption": "\\ud800"}', ["a.png caption_utf8"]),
    ("jsonl", b'{"image": "c.png", "caption": "\xff"}', ["c.png caption_utf8"]),
    ("jsonl", b"\xff\xfe{", ["line 3 bad_row"]),
    ("json", DEEP, ["row 3 bad_row"]),
    ("json", f"{DEEP}, {DEEP}", ["row 3 bad_row", "row 4 bad_row"]),
    ("json", "9" * 5000 + ", null", ["row 3 bad_row", "row 4 bad_row"]),
    ("json", '{"image": "]", "a": "\\"}", "a": 1}, 1', ["row 3 bad_row", "row 4 bad_row"]),
    ("json", b'{"image": "c.png", "caption": "\xff"}', ["c.png caption_utf8"]),
]


@pytest.mark.parametrize(("ending", "bad", "failures"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_left_out_and_the_rest_is_used(tmp_path, ending, bad, failures):
    before, after = {"csv": (GOOD_CSV, ""), "jsonl": (GOOD_JSONL, ""), "json": (f"[{GOOD_JSON}, ", "]")}[ending]
    bad = bad.encode() if isinstance(bad, str) else bad
    captions, errors = read(written(tmp_path, f"captions.{ending}", before.encode() + bad + after.encode()))
    assert captions == {"a.png": ["one"], "b.png": ["two"]}
    expected = [failure.rsplit(" ", 1) for failure in failures]
    assert errors == [(f"{file} of captions.{ending}" if " " in file else file, reason) for file, reason in expected]


def test_a_bad_row_may_be_the_first(tmp_path):
    good = {"a.png": ["one"], "b.png": ["two"]}
    assert read(written(tmp_path / "l", "captions.jsonl", b"\xff\n" + GOOD_JSONL.encode()))[0] == good
    assert read(written(tmp_path / "c", "captions.csv", "image,caption\nx\na.png,one\nb.png,two"))[0] == good
    assert read(written(tmp_path / "j", "captions.json", f"[{DEEP}, {GOOD_JSON}]"))[0] == good


def test_a_quoted_caption_may_have_lines_commas_and_quotes(tmp_path):
    content = 'image,caption\r\n\r\na.png,"two\r\nlines, and a ""quote"""\r\nb.png,no "quotes"\r\n'
    assert read(written(tmp_path, "captions.csv", content)) == (
        {"a.png": ['two\r\nlines, and a "quote"'], "b.png": ['no "quotes"']},
        [],
    )


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(text, text, text), max_size=6), quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
)
def test_what_a_csv_writer_writes_is_read(tmp_path_factory, rows, quoting):
    stream = io.StringIO()
    csv.writer(stream, quoting=quoting).writerows([("image", "more", "caption"), *rows])
    folder = written(tmp_path_factory.mktemp("table"), "captions.csv", stream.getvalue())
    found = [row for _, row in read_table(folder / "captions.csv", columns=COLUMNS)]
    assert found == [dict(zip(("image", "more", "caption"), row, strict=True)) for row in rows]


@settings(deadline=None)
@given(num=st.integers(1, 30), data=st.data())
def test_every_row_behind_a_quote_without_end_is_counted(tmp_path_factory, num, data):
    broken = data.draw(st.integers(0, num - 1))
    lines = [f"{row}.png,caption {row}" for row in range(num)]
    lines[broken] = lines[broken].replace(",", ',"')
    folder = written(tmp_path_factory.mktemp("table"), "captions.csv", "\n".join(["image,caption", *lines]))
    captions, errors = read(folder)
    assert list(captions) == [f"{row}.png" for row in range(broken)]
    assert errors == [(f"line {row + 2} of captions.csv", "bad_row") for row in range(broken, num)]


@settings(deadline=None)
@given(listed=st.lists(values, max_size=5), indent=st.sampled_from([None, 1]), deep=st.integers(0, 5))
def test_the_values_of_a_json_list_are_those_of_json(tmp_path_factory, listed, indent, deep):
    good = {"image": "a.png", "caption": "x"}
    nested = "[" * 3000 * deep + "]" * 3000 * deep or "0"
    content = json.dumps([good, *listed, good], indent=indent).removesuffix("]") + f", {nested}]"
    folder = written(tmp_path_factory.mktemp("table"), "captions.json", content)
    found = [row for _, row in read_table(folder / "captions.json", columns=COLUMNS)]
    usable = [row for row in [good, *listed, good] if isinstance(row, dict) and {"image", "caption"} <= set(row)]
    assert [row for row in found if isinstance(row, dict)] == usable
    assert len(found) == len(listed) + 3


@settings(deadline=None, max_examples=300)
@given(
    content=st.lists(
        st.sampled_from([b'"', b",", b"\n", b"\r", b"[", b"]", b"{", b"}", b":", b"\\", b"\xff", b"\0", b"PAR1", b"1"])
        | st.sampled_from([b'"image"', b'"caption"', b"image,caption\n", b'{"image": "a.png", "caption": "x"}']),
        max_size=30,
    ).map(b"".join),
    ending=st.sampled_from(["csv", "json", "jsonl", "parquet"]),
)
def test_whatever_a_table_holds_is_a_row_a_failure_or_an_error(tmp_path_factory, content, ending):
    folder = written(tmp_path_factory.mktemp("table"), f"captions.{ending}", content)
    try:
        captions, errors = read(folder)
    except DataError:
        return
    if ending == "jsonl":
        assert sum(map(len, captions.values())) + len(errors) == sum(
            bool(line.strip()) for line in content.split(b"\n")
        )


INT64 = 1 << 63
LABELS = [
    ("3", 3), ("-1", -1), ('"3"', 3), ('" +07 "', 7), (str(INT64 - 1), INT64 - 1), (str(-INT64), -INT64),
    ("3.0", 3), ('"-3.00"', -3), ("1.7", None), ('"1.7"', None), ("1e300", None), ('"3."', None),
    ("true", None), ("Infinity", None), ("1e400", None), ("[]", None),
    ('"cat"', None), ('"1_0"', None), ('"٣"', None), (f'"{"9" * 5000}"', None), (str(10**30), None),
    (str(INT64), None), (str(-INT64 - 1), None), (f'"{INT64}"', None), ("[" * 300 + "]" * 300, None),
]  # fmt: skip


@pytest.mark.parametrize(("spelled", "label"), LABELS, ids=range(len(LABELS)))
def test_a_label_is_an_integer_of_64_bits_or_a_bad_label(tmp_path, spelled, label):
    written(tmp_path, "captions.jsonl", f'{{"image": "a.png", "caption": "x", "label": {spelled}}}')
    errors = []
    (record,) = records_of(tmp_path, errors)
    assert record.fields == ({} if label is None else {"label": label})
    assert [error["reason"] for error in errors] == ([] if label is not None else ["bad_label"])


@pytest.mark.parametrize("spelled", ["null", '""', "NaN"])
def test_no_label_is_no_bad_label(tmp_path, spelled):
    written(tmp_path, "captions.jsonl", f'{{"image": "a.png", "caption": "x", "label": {spelled}}}')
    errors = []
    assert records_of(tmp_path, errors)[0].fields == {} and errors == []


@given(labels=st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=6))
def test_of_two_labels_neither_is_taken_whatever_their_order(tmp_path_factory, labels):
    rows = [json.dumps({"image": "a.png", "caption": "x", "label": label}) for label in labels]
    errors = []
    (record,) = records_of(written(tmp_path_factory.mktemp("table"), "captions.jsonl", "\n".join(rows)), errors)
    distinct = {label for label in labels if label is not None}
    assert record.fields == ({"label": distinct.pop()} if len(distinct) == 1 else {})
    assert [error["reason"] for error in errors] == (["bad_label"] if len(distinct) > 1 else [])
    assert len(record.captions) == len(labels)


def strings(*contents):
    """A column of texts that nobody checked."""
    return pa.array(contents, pa.binary()).view(pa.string())


def test_a_parquet_table_of_odd_columns(tmp_path):
    def reading(**columns):
        pq.write_table(pa.table(columns), tmp_path / "captions.parquet")
        return read(tmp_path)

    images = ["a.png", "b.png"]
    assert reading(image=images, caption=strings(b"x", b"\xff")) == ({"a.png": ["x"]}, [("b.png", "caption_utf8")])
    assert reading(image=strings(b"a.png", b"\xff.png"), caption=["x", "y"]) == (
        {"a.png": ["x"]},
        [("row 2 of captions.parquet", "bad_row")],
    )
    assert reading(image=pa.array(images).dictionary_encode(), caption=["x", None], other=[[1], [2]]) == (
        {"a.png": ["x"]},
        [("b.png", "bad_row")],
    )
    instants = pa.array([None, 1 << 62], pa.timestamp("ns"))
    assert reading(image=images, caption=["x", "y"], label=instants)[1] == [("b.png", "bad_label")]
    assert reading(image=images, caption=["x", "y"], label=pa.array([1, INT64], pa.uint64()))[1] == [
        ("b.png", "bad_label")
    ]
    assert reading(image=images, caption=["x", "y"], label=[math.nan, 2.0])[1] == []  # as pandas writes a gap
    assert reading(image=images, caption=["x", "y"], label=[math.inf, 2.5])[1] == [
        (name, "bad_label") for name in images
    ]
    assert reading(image=[{"bytes": b""}], caption=["x"]) == ({}, [("row 1 of captions.parquet", "bad_row")])
    assert reading(image=pa.array([b"a.png"]), caption=["x"]) == ({}, [("row 1 of captions.parquet", "bad_row")])


def test_a_large_table_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH", 7)
    images = [f"{number}.png" for number in range(100)]
    pq.write_table(pa.table({"image": images, "caption": images}), tmp_path / "captions.parquet", row_group_size=30)
    rows = read_table(tmp_path / "captions.parquet", columns=COLUMNS)
    assert [row["image"] for _, row in rows] == images


def test_a_table_of_other_columns_is_refused_before_its_rows_are_given(tmp_path):
    written(tmp_path, "captions.jsonl", '{"file": "a.png", "text": "x"}\n' * 1000)
    with pytest.raises(DataError, match="no row"):
        next(read_table(tmp_path / "captions.jsonl", columns=COLUMNS))
