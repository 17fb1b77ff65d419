"""A table that cannot be read is named, with what is wrong with it."""

from __future__ import annotations

import pytest

from vlm_train.data.importers import import_folder
from vlm_train.errors import DataError


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("captions.csv", "file,text\nx.jpg,hello\n", "lacks image, caption"),
        ("captions.json", "{}", "not a list"),
        ("captions.json", "[1]", "lacks image, caption"),
        ("captions.jsonl", "{broken\n", "cannot be read as jsonl"),
        ("captions.parquet", "no parquet", "cannot be read as parquet"),
        ("captions.csv", b"image,caption\nx.jpg,na\xefve\n", "cannot be read as csv"),
    ],
)
def test_a_table_that_is_none_is_an_error(tmp_path, name, content, match):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=match):
        import_folder(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
