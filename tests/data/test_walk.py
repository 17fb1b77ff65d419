import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.walk import Walk
from vlm_train.errors import DataError


def walk_of(num_rows=50, seed=0):
    rows = np.random.default_rng(seed).permutation(num_rows)
    return Walk(rows, manifest="m", provenance={"by": "image"})


def test_a_walk_is_the_same_after_saving(tmp_path):
    walk = walk_of()
    walk.save(tmp_path / "a" / "walk")
    found = Walk.load(tmp_path / "a" / "walk", "m")
    assert np.array_equal(found.rows, walk.rows) and found.fingerprint == walk.fingerprint
    assert (found.num_rows, found.manifest, found.provenance) == (50, "m", {"by": "image"})
    assert (tmp_path / "a" / "walk" / "walk.bin").read_bytes() == walk.rows.astype("<u4").tobytes()
    assert sorted(path.name for path in (tmp_path / "a" / "walk").iterdir()) == ["provenance.json", "walk.bin"]
    assert not found.rows.flags.owndata and not found.rows.flags.writeable  # mapped, so processes share it
    walk_of(seed=1).save(tmp_path / "a" / "walk")
    assert Walk.load(tmp_path / "a" / "walk", "m").fingerprint == walk_of(seed=1).fingerprint


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(-2, 9), max_size=8))
def test_what_does_not_pass_through_every_row_once_is_no_walk(rows):
    if sorted(rows) == list(range(len(rows))):
        assert Walk(np.array(rows, int)).num_rows == len(rows)
    else:
        with pytest.raises(DataError, match="every row once"):
            Walk(np.array(rows, int))


def test_a_walk_of_other_data_is_refused(tmp_path):
    walk_of().save(tmp_path)
    with pytest.raises(DataError, match="was made for other data"):
        Walk.load(tmp_path, "n")
    Walk(np.arange(4)).save(tmp_path)
    assert Walk.load(tmp_path, "any").num_rows == 4


def swapped(path):
    """Still every row once, so only the hash can tell."""
    rows = np.fromfile(path / "walk.bin", "<u4")
    rows[[0, 1]] = rows[[1, 0]]
    rows.tofile(path / "walk.bin")


def told(path, **facts):
    (path / "provenance.json").write_text(json.dumps(json.loads((path / "provenance.json").read_text()) | facts))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (swapped, "is damaged"),
        (lambda path: (path / "walk.bin").write_bytes((path / "walk.bin").read_bytes()[:-4]), "cannot be read"),
        (lambda path: (path / "walk.bin").write_bytes((path / "walk.bin").read_bytes()[:-1]), "cannot be read"),
        (lambda path: (path / "walk.bin").write_bytes(b""), "cannot be read"),
        (lambda path: (path / "walk.bin").unlink(), "cannot be read"),
        (lambda path: (path / "provenance.json").unlink(), "cannot be read"),
        (lambda path: (path / "provenance.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "provenance.json").write_text("[]"), "cannot be read"),
        (lambda path: told(path, version=2), "cannot be read"),
        (lambda path: told(path, num_rows="x"), "cannot be read"),
    ],
)
def test_damage_is_told(tmp_path, damage, said):
    walk_of().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=said) as caught:
        Walk.load(tmp_path, "m")
    assert "make the walk again" in caught.value.remedy


def test_a_kill_between_its_files_leaves_no_walk_of_mixed_parts(tmp_path):
    walk_of().save(tmp_path / "old")
    walk_of(seed=1).save(tmp_path / "new")
    (tmp_path / "new" / "walk.bin").rename(tmp_path / "old" / "walk.bin")
    with pytest.raises(DataError, match="is damaged"):
        Walk.load(tmp_path / "old", "m")
