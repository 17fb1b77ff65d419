"""Every pair of near codes, against each held to each; and cuts of the bits that would miss some."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import hamming_scan
from vlm_train.curation.hamming import pairs_within
from vlm_train.curation.hamming_passes import Pass, passes_of, plan, slots
from vlm_train.errors import ConfigError, DataError

MANY = settings(deadline=None, max_examples=60)
SOME = settings(deadline=None, max_examples=15)  # planning for 31 bits takes a tenth of a second


def flipped(codes, row, bits):
    copy = codes[row].copy()
    for bit in bits:
        copy[bit // 64] ^= np.uint64(1 << (63 - bit % 64))
    return copy


def some_codes(seed, num_words, radius, num_varied=None):
    """Codes [N, W] in any order: random ones, near copies of them and of copies, and many equal ones.

    Where `num_varied` is given, codes differ in that many bits at most, so that they crowd.
    """
    generator = np.random.default_rng(seed)
    num_bits = 64 * num_words
    codes = generator.integers(0, 1 << 64, (generator.integers(1, 40), num_words), dtype=np.uint64)
    if num_varied is not None:
        codes[:] = codes[0] ^ (codes & np.uint64((1 << num_varied) - 1))
    for _ in range(generator.integers(0, 40)):
        bits = generator.choice(num_bits, generator.integers(0, radius + 3), replace=False)
        codes = np.concatenate([codes, flipped(codes, generator.integers(len(codes)), bits)[None]])
    equal = generator.integers(0, len(codes), generator.integers(0, 100)) // generator.integers(1, 30)
    return generator.permutation(np.concatenate([codes, codes[equal]]))


def far(codes, left, right):
    return sum((int(a) ^ int(b)).bit_count() for a, b in zip(codes[left], codes[right], strict=True))


def each_held_to_each(codes, radius):
    """(row, later row, distance): equal codes as stars, distinct codes by their first rows."""
    firsts = {}
    for row, code in enumerate(codes.tolist()):
        firsts.setdefault(tuple(code), row)
    found = [(firsts[tuple(code)], row, 0) for row, code in enumerate(codes.tolist())]
    rows = list(firsts.values())
    found += [(a, b, far(codes, a, b)) for k, a in enumerate(rows) for b in rows[k + 1 :]]
    return sorted(pair for pair in found if pair[0] != pair[1] and pair[2] <= radius)


def as_list(pairs):
    return [(*rows, distance) for rows, distance in zip(pairs.rows.tolist(), pairs.distance.tolist(), strict=True)]


def as_given(codes):
    return codes[:, 0] if codes.shape[1] == 1 else codes


MEMORY = st.sampled_from([1, 3000, 20_000, 4 << 30])


@MANY
@given(st.integers(0, 2**32), st.integers(0, 8), st.sampled_from([None, 5, 14]), MEMORY, st.sampled_from([7, 1 << 16]))
def test_no_pair_of_short_codes_is_missed(seed, radius, num_varied, memory, chunk):
    codes = some_codes(seed, 1, radius, num_varied)
    with mock.patch.object(hamming_scan, "CHUNK", chunk):
        found = pairs_within(codes[:, 0], radius, memory=memory)
    assert as_list(found) == each_held_to_each(codes, radius)


@SOME
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 7, 31]), st.sampled_from([None, 14]), MEMORY)
def test_no_pair_of_long_codes_is_missed(seed, radius, num_varied, memory):
    codes = some_codes(seed, 4, radius, num_varied)
    assert as_list(pairs_within(codes, radius, memory=memory)) == each_held_to_each(codes, radius)


def joined(codes, passes, radius, max_rows):
    """Pairs of columns of distinct codes that the passes see, as often as they are reported."""
    columns, found = np.ascontiguousarray(codes.T), []
    for number, each in enumerate(passes):
        left, right = hamming_scan.join(columns, each, passes[:number], radius, max_rows)
        found += zip(np.minimum(left, right).tolist(), np.maximum(left, right).tolist(), strict=True)
    return sorted(found)


@MANY
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 99), st.integers(0, 3), st.integers(1, 100))
def test_every_cut_sees_each_near_pair_once(seed, radius, num_slots, more_blocks, max_rows):
    codes = np.unique(some_codes(seed, 1, radius, None), axis=0)
    cut = slots(64, radius, num_slots % (radius + 1) + 1)
    passes = [one for start, stop, flips in cut for one in passes_of(start, stop, flips, flips + 1 + more_blocks)]
    near = [pair[:2] for pair in each_held_to_each(codes, radius)]
    assert joined(codes, passes, radius, max_rows) == near


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_a_cut_that_fixes_one_block_too_many_misses_pairs(num_slots):
    """The twin: one slot bears one flip less, and codes that differ in one bit of each of its blocks are lost."""
    cut = slots(64, 4, num_slots)
    passes = [one for start, stop, flips in cut for one in passes_of(start, stop, flips, flips + 2)]
    short = [one for start, stop, flips in cut[:-1] for one in passes_of(start, stop, flips, flips + 2)]
    start, stop, flips = cut[-1]
    short += passes_of(start, stop, flips - 1, flips + 2) if flips else []
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 1 << 64, (500, 1), dtype=np.uint64)
    copies = [flipped(codes, row, generator.choice(64, 4, replace=False)) for row in range(500)]
    codes = np.concatenate([codes, copies])
    planted = [(row, row + 500) for row in range(500)]
    assert joined(codes, passes, 4, 1000) == planted
    assert 0 < len(joined(codes, short, 4, 1000)) < 490


def unfixed(passes, num_flips, num_bits):
    """Passes that are left when, one after the other, the bits are flipped that most of them fix."""
    passes = [frozenset(each.bits) for each in passes]
    for _ in range(num_flips):
        worst = max(range(num_bits), key=lambda bit: sum(bit in each for each in passes))
        passes = [each for each in passes if worst not in each]
    return passes


@pytest.mark.parametrize(("num_words", "radius"), [(1, 1), (1, 3), (1, 4), (1, 8), (1, 16), (4, 8), (4, 31)])
@pytest.mark.parametrize("num_codes", [2, 3000, 40_000])
def test_a_plan_bears_as_many_flips_as_the_radius_and_no_more(num_words, radius, num_codes):
    codes = np.random.default_rng(0).integers(0, 1 << 64, (num_words, num_codes), dtype=np.uint64)
    passes = plan(codes, radius)
    assert unfixed(passes, radius, 64 * num_words)
    assert not unfixed(passes, radius + 1, 64 * num_words)  # the twin: a plan for fewer flips is noticed


def test_the_cut_follows_how_codes_crowd():
    """Where only 20 bits vary, passes over 64 varied bits would look at far more pairs than was thought."""
    spread = np.random.default_rng(0).integers(0, 1 << 64, (1, 50_000), dtype=np.uint64)
    crowded = np.unique(spread & np.uint64(0xFFFFF0000000000F))[None]
    assert len(plan(crowded, 2)) > len(plan(spread[:, : crowded.shape[1]], 2))


def test_prefixes_keep_the_order_of_the_fixed_bits():
    codes = np.random.default_rng(0).integers(0, 1 << 64, (4, 50), dtype=np.uint64)
    bits = (0, 1, 2, 5, 62, 63, 64, 65, 130, 255)
    texts = ["".join(f"{int(word):064b}" for word in code) for code in codes.T]
    assert Pass(bits).prefix(codes).tolist() == [int("".join(text[bit] for bit in bits), 2) for text in texts]


@pytest.mark.parametrize(("num_words", "radius"), [(1, 4), (4, 31)])
def test_workers_and_memory_change_nothing(num_words, radius, tmp_path):
    codes = np.concatenate([some_codes(seed, num_words, radius, None) for seed in range(20)])
    np.save(tmp_path / "codes.npy", as_given(codes))
    whole = as_list(pairs_within(as_given(codes), radius))
    assert len(whole) > 500
    mapped = np.load(tmp_path / "codes.npy", mmap_mode="r")
    for workers, memory in ((1, 9000), (2, 60_000), (5, 4 << 30)):
        assert as_list(pairs_within(mapped, radius, memory=memory, workers=workers, folder=tmp_path)) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["codes.npy"]


def test_a_million_equal_codes_are_a_star():
    codes = np.full(1_000_000, 5, np.uint64)
    codes[[10, 500_000]] = 4, 1 << 63
    pairs = pairs_within(codes, 4)
    assert len(pairs) == 999_997 + 3 and pairs.rows.dtype == np.uint32
    assert pairs.distance[pairs.rows[:, 1] == 10].tolist() == [1]
    assert pairs.distance[pairs.rows[:, 1] == 500_000].tolist() == [3, 2]
    assert (pairs.rows[:, 0] == 0).sum() == 999_999  # all but the pair of rows 10 and 500,000


def test_more_pairs_than_can_be_held_are_refused():
    codes = np.array([0, 1, 2, 4, 8], np.uint64)
    assert len(pairs_within(codes, 2, most=10)) == 10
    with pytest.raises(DataError, match="at most 9"):
        pairs_within(codes, 2, most=9)


@pytest.mark.parametrize("codes", [np.empty(0, np.uint64), np.zeros(1, np.uint64), np.empty((0, 4), np.uint64)])
def test_nothing_to_pair(codes):
    assert len(pairs_within(codes, 4)) == 0


@pytest.mark.parametrize(
    ("codes", "radius", "options"),
    [
        (np.zeros(3, np.int64), 4, {}),
        (np.zeros((3, 2), np.uint64), 4, {}),
        (np.zeros((3, 4, 1), np.uint64), 4, {}),
        (np.zeros(3, np.uint64), 17, {}),
        (np.zeros(3, np.uint64), -1, {}),
        (np.zeros((3, 4), np.uint64), 65, {}),
        (np.zeros(3, np.uint64), 4, {"memory": 0}),
        (np.zeros(3, np.uint64), 4, {"workers": 0}),
    ],
)
def test_what_cannot_be_joined_is_named(codes, radius, options):
    with pytest.raises(ConfigError):
        pairs_within(codes, radius, **options)
