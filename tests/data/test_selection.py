import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.selection import Selection
from vlm_train.errors import DataError

MASKS = st.one_of(
    st.lists(st.booleans(), max_size=200),
    st.tuples(st.integers(0, 5000), st.floats(0, 1), st.integers(0, 99)).map(
        lambda t: (np.random.default_rng(t[2]).random(t[0]) < t[1]).tolist()
    ),
    st.sampled_from([0, 63, 64, 65, 1023, 1024, 1025, 2048]).map(lambda n: [True] * n),
)


@settings(max_examples=80, deadline=None)
@given(mask=MASKS)
def test_rank_and_select_agree_with_the_mask(mask):
    mask = np.array(mask, bool)
    selection = Selection.from_mask(mask)
    rows = np.flatnonzero(mask)
    assert len(selection) == len(rows)
    assert np.array_equal(selection.mask(), mask)
    assert np.array_equal(selection.select(np.arange(len(rows))), rows)
    assert np.array_equal(selection.rank(np.arange(len(mask) + 1)), np.concatenate([[0], np.cumsum(mask)]))


def test_counts_per_shard():
    mask = np.array([1, 0, 1, 1, 0, 0, 1], bool)
    assert Selection.from_mask(mask).counts(np.array([0, 3, 3, 6, 7])).tolist() == [2, 0, 1, 1]


def test_the_index_costs_six_per_cent():
    selection = Selection.all(1 << 20)
    assert selection._before.nbytes / selection._words.nbytes < 0.063


def test_save_and_load(tmp_path):
    mask = np.random.default_rng(0).random(3000) < 0.3
    made = Selection.from_mask(mask, manifest="abc", provenance={"rules": [{"name": "clip_score", "min": 0.28}]})
    made.save(tmp_path / "s")
    read = Selection.load(tmp_path / "s", "abc")
    assert np.array_equal(read.mask(), mask) and read.fingerprint == made.fingerprint
    assert read.provenance == made.provenance
    assert json.loads((tmp_path / "s/provenance.json").read_text())["num_kept"] == mask.sum()


def test_another_manifest_is_refused(tmp_path):
    Selection.from_mask(np.ones(5, bool), manifest="abc").save(tmp_path)
    with pytest.raises(DataError, match="other data"):
        Selection.load(tmp_path, "abd")


def test_damage_is_refused(tmp_path):
    Selection.from_mask(np.ones(100, bool), manifest="abc").save(tmp_path)
    np.save(tmp_path / "selection.npy", np.zeros(2, np.uint64))
    with pytest.raises(DataError, match="damaged"):
        Selection.load(tmp_path, "abc")
    (tmp_path / "selection.npy").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be read"):
        Selection.load(tmp_path, "abc")
    with pytest.raises(DataError, match="cannot be read"):
        Selection.load(tmp_path / "nowhere", "abc")


def test_a_pickle_is_never_decoded(tmp_path):
    Selection.from_mask(np.ones(4, bool), manifest="abc").save(tmp_path)
    np.save(tmp_path / "selection.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        Selection.load(tmp_path, "abc")


def test_a_selection_of_other_bits_has_another_fingerprint():
    one, other = np.ones(70, bool), np.ones(70, bool)
    other[69] = False
    prints = {
        Selection.from_mask(one).fingerprint,
        Selection.from_mask(other).fingerprint,
        Selection.all(71).fingerprint,
    }
    assert len(prints) == 3 and Selection.all(70).fingerprint in prints
