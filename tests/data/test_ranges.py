"""Coalescing: every byte wanted, few requests, and never more than the promised overhead."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.data.ranges import batches, clamp, coalesce, cut, held, split, union

RANGES = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 200)), max_size=40)
CONTENT = np.random.default_rng(0).bytes(4000)


def bytes_of(ranges):
    return {place for offset, length in ranges for place in range(offset, offset + length)}


@given(RANGES, st.floats(0, 1), st.integers(0, 500))
def test_requests_cover_what_is_wanted_and_little_else(ranges, max_overhead, max_gap):
    requests = coalesce(ranges, max_overhead=max_overhead, max_gap=max_gap)
    wanted, got = bytes_of(ranges), bytes_of(requests)
    assert wanted <= got and sum(length for _, length in requests) == len(got)
    assert len(got) - len(wanted) <= max_overhead * len(wanted)
    assert all(before[0] + before[1] < after[0] for before, after in pairwise(requests))
    vain = sorted(got - wanted)
    runs = np.split(vain, np.flatnonzero(np.diff(vain) > 1) + 1) if vain else []
    assert all(len(run) <= max_gap for run in runs)
    # the smallest gap that was not bridged would have broken a promise
    gaps = [after[0] - sum(before) for before, after in pairwise(requests)]
    assert not gaps or min(gaps) > max_gap or len(vain) + min(gaps) > int(max_overhead * len(wanted))
    chunks = [CONTENT[offset : offset + length] for offset, length in requests]
    assert cut(ranges, requests, chunks) == [CONTENT[offset : offset + length] for offset, length in ranges]


def test_a_greedy_rule_would_read_too_much():
    """What readers do that only look at single gaps: it breaks the promise that `coalesce` keeps."""
    ranges = [(start, 1000) for start in range(0, 10**6, 10_000)]
    greedy, ours = coalesce(ranges, max_overhead=1e9, max_gap=64_000), coalesce(ranges, max_gap=64_000)
    assert sum(length for _, length in greedy) > 9 * 100_000
    assert sum(length for _, length in ours) <= 1.15 * 100_000


@given(RANGES, RANGES, st.randoms())
def test_held(wanted, present, random):
    rows = [(offset, offset + length) for offset, length in present if length]
    random.shuffle(rows)
    answers = held(wanted, np.array(rows, np.uint64).reshape(-1, 2))
    there = bytes_of(present)
    assert answers.tolist() == [bytes_of([item]) <= there for item in wanted]


@given(RANGES, st.integers(1, 300), st.integers(1, 900))
def test_union_split_and_batches_keep_every_byte(ranges, piece, batch):
    blocks = union(ranges)
    assert bytes_of(blocks) == bytes_of(ranges)
    assert all(sum(before) < after[0] for before, after in pairwise(blocks))
    pieces = list(split(blocks, piece))
    assert union(pieces) == blocks and all(0 < length <= piece for _, length in pieces)
    groups = list(batches(pieces, batch))
    assert [item for group in groups for item in group] == pieces
    assert all(sum(length for _, length in group) < batch + piece for group in groups)


@given(RANGES, st.integers(0, 3000))
def test_clamp_is_what_a_file_of_that_size_gives(ranges, size):
    content = CONTENT[:size]
    found = [content[offset : offset + length] for offset, length in clamp(ranges, size)]
    assert found == [content[offset : offset + length] for offset, length in ranges]
