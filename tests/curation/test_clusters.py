"""Clusters against a plain search through the graph, in any order of the edges; and who stands for a cluster."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import clusters
from vlm_train.curation.clusters import canonical, components
from vlm_train.curation.hamming import pairs_within
from vlm_train.errors import ConfigError

MANY = settings(deadline=None, max_examples=150)
GRAPHS = st.integers(1, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=80))
)


def searched(num_rows, edges):
    """The smallest row that can be reached from each."""
    neighbours = {row: set() for row in range(num_rows)}
    for a, b in edges:
        neighbours[a].add(b)
        neighbours[b].add(a)
    smallest = {}
    for row in range(num_rows):
        todo = [row] if row not in smallest else []
        while todo:
            here = todo.pop()
            if here not in smallest:
                smallest[here] = row
                todo += neighbours[here]
    return [smallest[row] for row in range(num_rows)]


def in_blocks(edges, size):
    edges = np.array(edges, np.int64).reshape(-1, 2)
    return [edges[start : start + size] for start in range(0, len(edges), size)]


@MANY
@given(GRAPHS, st.integers(1, 100), st.randoms())
def test_clusters_do_not_depend_on_the_order_of_edges(graph, size, random):
    num_rows, edges = graph
    expected = searched(num_rows, edges)
    assert components(num_rows, in_blocks(edges, 1000)).tolist() == expected
    shuffled = [edge if random.random() < 0.5 else edge[::-1] for edge in edges]
    random.shuffle(shuffled)
    assert components(num_rows, in_blocks(shuffled, size)).tolist() == expected


def hooked_once(num_rows, edges):
    """The wrong twin: each row takes the smallest of its neighbours, once."""
    labels = np.arange(num_rows)
    np.minimum.at(labels, edges.max(axis=1), edges.min(axis=1))
    return labels


@pytest.mark.parametrize("num_rows", [2, 1000, 200_000])
def test_long_paths(num_rows, monkeypatch):
    monkeypatch.setattr(clusters, "BLOCK", 50_000)
    path = np.column_stack([np.arange(num_rows - 1), np.arange(1, num_rows)])
    mixed = np.random.default_rng(0).permutation(num_rows)[np.random.default_rng(1).permutation(path)]
    for edges in (path, path[::-1], mixed):
        assert components(num_rows, [edges]).max() == 0
    assert num_rows == 2 or hooked_once(num_rows, path).max() > 0


def test_pairs_of_codes_make_the_clusters_of_all_pairs():
    """Equal codes come as stars and distinct codes by their first rows; their clusters are those of all pairs."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 1 << 64, 60, dtype=np.uint64)
    copies = codes[generator.integers(0, 60, 200)] ^ (np.uint64(1) << generator.integers(0, 64, 200, dtype=np.uint64))
    codes = generator.permutation(np.concatenate([codes, copies, np.repeat(codes[:3], 40)]))
    near = np.argwhere(np.bitwise_count(codes[:, None] ^ codes) <= 1)
    pairs = pairs_within(codes, 1)
    found = components(len(codes), [pairs.rows])
    assert found.tolist() == components(len(codes), [near]).tolist()
    assert len(pairs) < len(near) / 10 and found.dtype == np.int32


def test_no_edges():
    assert components(3, []).tolist() == [0, 1, 2]
    assert components(0, [np.empty((0, 2), np.uint32)]).tolist() == []


@pytest.mark.parametrize("edge", [(0, 3), (-1, 2)])
def test_an_edge_to_nowhere(edge):
    with pytest.raises(ConfigError, match="not there"):
        components(3, [np.array([edge])])


@MANY
@given(GRAPHS, st.integers(0, 2**32), st.booleans())
def test_the_one_that_stands_for_a_cluster_does_not_depend_on_the_order_of_rows(graph, seed, preferred):
    num_rows, edges = graph
    generator = np.random.default_rng(seed)
    uids = generator.integers(0, 256, (num_rows, 16), dtype=np.uint8)
    uids[:, : generator.integers(0, 16)] = 0  # uids that differ late, and that begin with zeros
    uids[:, 15] = np.arange(num_rows)
    pixels = generator.integers(0, 3, num_rows)
    labels = components(num_rows, in_blocks(edges, 1000))
    chosen = canonical(labels, uids, pixels if preferred else None)
    ranks = (pixels if preferred else np.zeros(num_rows)).tolist()
    for row in range(num_rows):
        members = np.flatnonzero(labels == labels[row]).tolist()
        assert chosen[row] == min(members, key=lambda each: (-ranks[each], uids[each].tobytes()))
    order = generator.permutation(num_rows)
    places = np.argsort(order)
    moved = components(num_rows, in_blocks(places[np.array(edges, np.int64).reshape(-1, 2)], 1000))
    again = canonical(moved, uids[order], pixels[order] if preferred else None)
    assert np.array_equal(order[again], chosen[order])


def test_the_smallest_row_would_depend_on_the_order_of_rows():
    """The wrong twin of the above."""
    edges, order = np.array([[0, 2]]), np.array([2, 1, 0])
    smallest = components(3, [edges])
    moved = components(3, [np.argsort(order)[edges]])
    assert not np.array_equal(order[moved], smallest[order])


def test_a_preference_that_is_no_number_comes_last():
    uids = np.eye(3, 16, dtype=np.uint8)
    labels = np.zeros(3, np.int32)
    assert canonical(labels, uids, np.array([np.nan, 1.0, 2.0])).tolist() == [2, 2, 2]
    assert canonical(labels, uids, np.array([7, 7, 2], np.uint32)).tolist() == [1, 1, 1]  # the smaller uid
    assert canonical(labels, uids).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("uids", "preference"),
    [
        (np.zeros((3, 8), np.uint8), None),
        (np.zeros((2, 16), np.uint8), None),
        (np.zeros((3, 16), np.int8), None),
        (np.zeros((3, 16), np.uint8), np.zeros(2)),
    ],
)
def test_arrays_of_other_shapes(uids, preference):
    with pytest.raises(ConfigError, match="fit the clusters"):
        canonical(np.arange(3), uids, preference)
