import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_train.data.cumulative import UNIT, Bits, Weights
from vlm_train.data.selection import Selection, _offset
from vlm_train.errors import DataError

MASKS = st.one_of(
    st.lists(st.booleans(), max_size=200),
    st.tuples(st.integers(0, 5000), st.floats(0, 1), st.integers(0, 99)).map(
        lambda t: (np.random.default_rng(t[2]).random(t[0]) < t[1]).tolist()
    ),
    st.sampled_from([0, 63, 64, 65, 1023, 1024, 1025, 2048]).map(lambda n: [True] * n),
)
WEIGHTS = st.one_of(
    st.lists(st.integers(0, 3000).map(lambda units: units / UNIT), max_size=30),
    st.lists(st.sampled_from([0, 1 / 256, 0.25, 0.5, 1, 2, 3.75, 255.99609375]), max_size=12),
    st.tuples(st.sampled_from([127, 128, 129, 300]), st.integers(0, 99)).map(
        lambda t: (np.random.default_rng(t[1]).integers(0, 700, t[0]) / UNIT).tolist()
    ),
)
PINNED = [[0, 1, 1, 3, 5, 5, 5], [0, 1, 1, 3, 5, 5, 5], [1, 1, 3, 3, 5, 5, 5]]
SEEDS = st.integers(-(2**63), 2**63)


def times_of(draw, num_rows, seed, epochs):
    """How often each row comes in each epoch: [num_epochs, num_rows]."""
    return np.array([np.bincount(draw(seed, epoch), minlength=num_rows) for epoch in epochs])


def drawn(selection):
    return lambda seed, epoch: selection.select(np.arange(len(selection)), seed, epoch)


@settings(max_examples=80, deadline=None)
@given(mask=MASKS)
def test_bits_find_what_a_pass_over_the_mask_finds(mask):
    mask = np.array(mask, bool)
    selection, rows = Selection.from_mask(mask), np.flatnonzero(mask)
    assert len(selection) == selection.content.num_kept() == len(rows)
    assert np.array_equal(selection.mask(), mask)
    assert np.array_equal(drawn(selection)(0, 0), rows) and np.array_equal(drawn(selection)(5, 77), rows)
    before = selection.content.before(np.arange(len(mask) + 1))
    assert np.array_equal(before, np.concatenate([[0], np.cumsum(mask)]) * UNIT)


@settings(max_examples=80, deadline=None)
@given(weights=WEIGHTS, seed=SEEDS, epoch=st.integers(0, 2**31))
def test_weights_find_what_units_laid_end_to_end_hold(weights, seed, epoch):
    units = (np.array(weights) * UNIT).astype(np.int64)
    selection, owner = Selection.from_weights(weights), np.repeat(np.arange(len(units)), units)
    assert len(selection) == len(owner) // UNIT and selection.content.num_kept() == np.count_nonzero(units)
    assert np.array_equal(selection.content.find(np.arange(len(owner))), owner)
    before = selection.content.before(np.arange(len(units) + 1))
    assert np.array_equal(before, np.concatenate([[0], np.cumsum(units)]))
    every_256th = owner[_offset(seed, epoch) :: UNIT][: len(selection)]
    assert np.array_equal(drawn(selection)(seed, epoch), every_256th)


def exact(draw, units, seed):
    """What the head of selection.py promises, for epochs 3 to 258."""
    times = times_of(draw, len(units), seed, range(3, 3 + UNIT))
    remainder = units.sum() % UNIT
    last = np.cumsum(units) > units.sum() - remainder  # the rows that the undrawn end of the file touches
    constant = len(set(times.sum(axis=1).tolist())) == 1
    bounded = ((times >= units // UNIT) & (times <= -(-units // UNIT)))[:, ~last].all()
    whole = (times.sum(axis=0) == units)[~last].all()
    return constant, bounded, whole, 0 <= units.sum() - times.sum() == remainder < UNIT


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS.filter(lambda weights: sum(weights) >= 1), seed=SEEDS)
def test_a_row_comes_exactly_as_often_as_its_weight_says(weights, seed):
    units = (np.array(weights) * UNIT).astype(np.int64)
    assert exact(drawn(Selection.from_weights(weights)), units, seed) == (True, True, True, True)


def test_wrong_twins_miss_the_weights():
    """What other loaders do: draw each row for itself, draw with replacement, or move on by an even step."""
    units = np.random.default_rng(0).integers(0, 700, 300)
    ends, length = np.cumsum(units), units.sum() // UNIT

    def alone(seed, epoch):
        return np.repeat(np.arange(300), (units + np.random.default_rng([seed, epoch]).integers(0, UNIT, 300)) // UNIT)

    def replaced(seed, epoch):
        return np.sort(np.random.default_rng([seed, epoch]).choice(300, length, p=units / units.sum()))

    def even(seed, epoch):
        return np.searchsorted(ends, np.arange(length) * UNIT + 158 * epoch % UNIT, side="right")

    def odd(seed, epoch):
        return np.searchsorted(ends, np.arange(length) * UNIT + 159 * epoch % UNIT, side="right")

    assert exact(alone, units, 0)[0::2] == (False, False)  # epochs of different lengths, and not exact
    assert exact(replaced, units, 0)[:3] == (True, False, False)
    assert exact(even, units, 0)[:3] == (True, True, False)
    assert exact(odd, units, 0) == (True, True, True, True)


def test_a_few_epochs_are_spread_as_well_as_many():
    """A row of weight 1/2 comes in about half of any few epochs, not in the first half of 256."""
    selection = Selection.from_weights(np.full(1000, 0.5))
    times = times_of(drawn(selection), 1000, 7, range(8)).sum(axis=0)
    assert times.min() >= 3 and times.max() <= 5


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, cuts=st.lists(st.floats(0, 1), max_size=8), seed=SEEDS, epoch=st.integers(0, 300))
def test_counts_are_the_slots_of_each_shard(weights, cuts, seed, epoch):
    starts = np.array(sorted([0, *(int(cut * len(weights)) for cut in cuts), len(weights)]))
    selection = Selection.from_weights(weights)
    shard = np.searchsorted(starts, drawn(selection)(seed, epoch), side="right") - 1
    expected = np.bincount(shard, minlength=len(starts) - 1) if len(shard) else np.zeros(len(starts) - 1)
    assert np.array_equal(selection.counts(starts, seed, epoch), expected)


def test_the_draw_is_pinned():
    """The stream of a run must not change with a release: these figures were computed once and are the definition."""
    selection = Selection.from_weights([0.5, 2, 0, 1.25, 0.25, 3])
    assert [drawn(selection)(7, epoch).tolist() for epoch in range(3)] == PINNED


def test_counts_of_many_shards_and_of_empty_ones():
    mask = np.array([1, 0, 1, 1, 0, 0, 1], bool)
    assert Selection.from_mask(mask).counts(np.array([0, 3, 3, 6, 7]), 0, 5).tolist() == [2, 0, 1, 1]
    weights = np.random.default_rng(0).integers(0, 4, 20_000)
    assert np.array_equal(Selection.from_weights(weights).counts(np.arange(20_001), 0, 0), weights)


@settings(max_examples=30, deadline=None)
@given(mask=MASKS, seed=SEEDS, epoch=st.integers(0, 300))
def test_bits_are_the_weights_0_and_1(mask, seed, epoch):
    mask = np.array(mask, bool)
    bits, weights = Selection.from_mask(mask), Selection.from_weights(mask.astype(float))
    assert np.array_equal(drawn(bits)(seed, epoch), drawn(weights)(seed, epoch))
    assert np.array_equal(bits.mask(), weights.mask())
    start, stop = len(mask) // 3, len(mask) * 2 // 3
    expected = start + np.flatnonzero(mask[start:stop])
    assert np.array_equal(bits.kept(start, stop), expected) and np.array_equal(weights.kept(start, stop), expected)


@settings(max_examples=40, deadline=None)
@given(mask=MASKS, cuts=st.lists(st.floats(0, 1), max_size=8))
def test_packing_does_not_depend_on_how_the_rows_come(mask, cuts):
    mask = np.array(mask, bool)
    edges = sorted({int(cut * len(mask)) for cut in cuts})
    pieces = np.split(mask, edges)
    assert Bits.pack(pieces, len(mask)).fingerprint == Bits.pack([mask], len(mask)).fingerprint
    assert Weights.pack(pieces, len(mask)).fingerprint == Weights.pack([mask], len(mask)).fingerprint


def test_weights_are_rounded_to_the_nearest_256th():
    selection = Selection.from_weights([0.1, 1 / 3, 0.001, 0.002, 255.9979])
    assert selection.content.array[:6].tolist() == [26, 85, 0, 1, 65535, 0]


@pytest.mark.parametrize("wrong", [-0.001, float("nan"), 256.0, float("inf"), 255.999])
def test_a_weight_that_cannot_be_is_refused_with_its_row(wrong):
    weights = np.ones(1_100_000)
    weights[1_050_000] = wrong
    with pytest.raises(DataError, match=r"weight of row 1050000 (.|\n)*255\.996"):
        Selection.from_weights(weights)


def test_the_sums_cost_a_few_per_cent():
    bits, weights = Selection.all(1 << 20).content, Selection.from_weights(np.ones(1 << 20)).content
    assert bits._before.nbytes / bits.array.nbytes < 0.063
    assert weights._before.nbytes / weights.array.nbytes < 0.032


@pytest.mark.parametrize("make", [Selection.from_mask, Selection.from_weights])
def test_save_and_load(tmp_path, make):
    weights = np.random.default_rng(0).integers(0, 2, 3000).astype(bool)
    made = make(weights, manifest="abc", provenance={"rules": [{"name": "clip_score", "min": 0.28}]})
    made.save(tmp_path / "s")
    read = Selection.load(tmp_path / "s", "abc")
    read.verify()
    assert np.array_equal(read.mask(), weights) and read.fingerprint == made.fingerprint
    assert read.provenance == made.provenance and np.array_equal(drawn(read)(1, 2), drawn(made)(1, 2))
    facts = json.loads((tmp_path / "s/provenance.json").read_text())
    assert facts["num_kept"] == facts["num_slots"] == weights.sum() and facts["content"] == made.content.file_name


def test_a_directory_holds_the_content_of_its_provenance_alone(tmp_path):
    Selection.from_weights(np.ones(300), manifest="abc").save(tmp_path)
    Selection.from_mask(np.ones(300, bool), manifest="abc").save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["provenance.json", "selection.npy"]


def test_a_selection_of_the_first_version_is_read(tmp_path):
    Selection.from_mask(np.arange(100) % 3 == 0, manifest="abc").save(tmp_path)
    facts = json.loads((tmp_path / "provenance.json").read_text())
    old = {name: facts[name] for name in ("manifest", "num_rows", "num_kept", "fingerprint")} | {"version": 1}
    (tmp_path / "provenance.json").write_text(json.dumps(old))
    assert len(Selection.load(tmp_path, "abc")) == 34
    (tmp_path / "provenance.json").write_text(json.dumps(old | {"version": 3}))
    with pytest.raises(DataError, match="version 3"):
        Selection.load(tmp_path, "abc")


def test_weights_are_mapped_and_not_copied(tmp_path):
    """A second process that loads 64 MB of weights and reads one of them must not hold 64 MB of its own."""
    Selection.from_weights(np.ones(1 << 25, np.float32), manifest="abc").save(tmp_path)
    code = (
        "import sys, numpy as np\nfrom vlm_train.data.selection import Selection\n"
        "s = Selection.load(sys.argv[1], 'abc'); s.select(np.array([5]), 0, 0)\n"
        "print(next(line.split()[1] for line in open('/proc/self/smaps_rollup') if line.startswith('Anonymous')))"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 60_000  # kB; measured 31,000, of which 2,100 are the sums
    assert os.path.getsize(tmp_path / "weights.npy") > 1 << 26


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


def test_damaged_weights_are_refused(tmp_path):
    Selection.from_weights(np.arange(1000) % 3, manifest="abc").save(tmp_path)
    path = tmp_path / "weights.npy"
    whole = np.load(path)

    np.save(path, whole + np.uint16(1))  # as when a save broke off between its two files
    with pytest.raises(DataError, match="damaged"):
        Selection.load(tmp_path, "abc")
    for wrong in (whole[:-128], whole.astype(np.int64)):
        np.save(path, wrong)
        with pytest.raises(DataError, match="cannot be read"):
            Selection.load(tmp_path, "abc")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read"):
        Selection.load(tmp_path, "abc")

    swapped = whole.copy()
    swapped[[0, 1]] = whole[[1, 0]]  # the sums do not show it: what a load leaves to `verify`
    np.save(path, swapped)
    with pytest.raises(DataError, match="damaged"):
        Selection.load(tmp_path, "abc").verify()


@pytest.mark.parametrize("make", [Selection.from_mask, Selection.from_weights])
def test_a_pickle_is_never_decoded(tmp_path, make):
    made = make(np.ones(4, bool), manifest="abc")
    made.save(tmp_path)
    np.save(tmp_path / made.content.file_name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        Selection.load(tmp_path, "abc")


def test_other_content_has_another_fingerprint():
    one, other = np.ones(70, bool), np.ones(70, bool)
    other[69] = False
    selections = [
        Selection.from_mask(one),
        Selection.from_mask(other),
        Selection.all(71),
        Selection.from_weights(one),
        Selection.from_weights(one * 1.004),
        Selection.from_weights(np.ones(71)),
    ]
    prints = {selection.fingerprint for selection in selections}
    assert len(prints) == 6 and Selection.all(70).fingerprint in prints


NO_FILES = [b"[" * 100_000, b"PK\3\4" + bytes(40), b"null", b"{}", b"9" * 9999]
ODD = st.sampled_from([None, {}, [], -1, True, 1.5, 10**30, "x", "", [1], {"a": 1}])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gives_another_selection_or_anything_but_an_error_of_ours(tmp_path, data):
    if data.draw(st.booleans(), label="weights"):
        made = Selection.from_weights(np.arange(200) % 3, manifest="abc")
    else:
        made = Selection.from_mask(np.arange(200) % 3 > 0, manifest="abc")
    made.save(tmp_path)
    provenance = tmp_path / "provenance.json"
    path = data.draw(st.sampled_from([provenance, tmp_path / made.content.file_name]))
    how = data.draw(st.sampled_from(["flip", "cut", "fill", "other"]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        content[place] = data.draw(st.integers(0, 255))
    elif how == "cut":
        del content[place:]
    elif how == "fill":
        content = bytearray(data.draw(st.sampled_from(NO_FILES)))
    elif path == provenance:
        facts = json.loads(content)
        name = data.draw(st.sampled_from(sorted(facts)))
        content = bytearray(json.dumps({**facts, name: data.draw(ODD)}).encode())
    path.write_bytes(content)
    try:
        found = Selection.load(tmp_path, "abc")
        found.verify()
    except DataError:
        return
    assert found.fingerprint == made.fingerprint and np.array_equal(found.kept(0, 200), made.kept(0, 200))
