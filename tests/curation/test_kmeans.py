import hashlib
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import kmeans
from vlm_train.curation.kmeans import default_num_clusters, spherical, unit_rows
from vlm_train.errors import ConfigError, DataError


def rows_of(num_rows, dim=24, num_topics=6, seed=0):
    """(float32 unit rows around some topics, uids)."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_topics, dim))[rng.integers(num_topics, size=num_rows)]
    rows = rows + 0.7 * rng.standard_normal((num_rows, dim))
    uids = rng.integers(256, size=(num_rows, 16), dtype=np.uint8)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), uids


def bits_of(clusters, back=slice(None)):
    parts = clusters.centroids_KD, clusters.nearest[back], clusters.cosine[back]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def by_plain_loops(rows, uids, num_clusters, num_iterations, seed=0):
    """(labels, centroids), by the words of the docstring; without empty clusters."""
    rows = [row / np.linalg.norm(row) for row in rows.astype(np.float64)]
    drawn = kmeans._drawn(uids, seed)
    centroids = [rows[row] for row in sorted(range(len(rows)), key=lambda row: drawn[row])[:num_clusters]]
    for number in range(num_iterations + 1):
        labels = [max(range(num_clusters), key=lambda k: (row @ centroids[k], -k)) for row in rows]
        if number < num_iterations:
            means = [sum(rows[row] for row in range(len(rows)) if labels[row] == k) for k in range(num_clusters)]
            centroids = [mean / np.linalg.norm(mean) for mean in means]
    return labels, np.stack(centroids)


@pytest.mark.parametrize("block", [7, 1024])
def test_it_is_the_k_means_of_plain_loops(monkeypatch, block):
    monkeypatch.setattr(kmeans, "BLOCK", block)
    rows, uids = rows_of(150, num_topics=60)
    found = spherical(rows, uids, num_clusters=9, num_iterations=3)
    labels, centroids = by_plain_loops(rows, uids, 9, 3)
    assert found.nearest[:, 0].tolist() == labels and found.num_iterations == 3
    np.testing.assert_allclose(found.centroids_KD, centroids, atol=6e-8)  # measured 2.1e-8: the grid
    assert by_plain_loops(rows, uids, 9, 2)[0] != labels  # the twin: one move fewer
    assert by_plain_loops(rows, uids, 9, 3, seed=1)[0] != labels


def test_products_of_unit_rows_do_not_round():
    rows, _ = rows_of(6, dim=300)
    unit = unit_rows(rows, slice(0, 6), "cpu")
    products = (unit @ unit.T).numpy()
    plain = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)

    def in_fractions(rows):
        whole = [[Fraction(float(value)) for value in row] for row in rows]
        return [[sum(a * b for a, b in zip(row, other, strict=True)) for other in whole] for row in whole]

    assert in_fractions(unit) == [[Fraction(float(value)) for value in row] for row in products]
    assert in_fractions(plain) != [[Fraction(float(value)) for value in row] for row in plain @ plain.T]  # the twin
    assert np.abs(unit.numpy() - plain).max() <= 2.0**-26


def test_the_order_of_rows_and_the_blocks_change_no_bit(monkeypatch):
    rows, uids = rows_of(300)
    bits = bits_of(spherical(rows, uids, num_clusters=20))

    def permuted(seed):
        order = np.random.default_rng(seed).permutation(len(rows))
        return bits_of(spherical(rows[order], uids[order], num_clusters=20), order.argsort())

    assert {permuted(seed) for seed in range(3)} == {bits}
    for block in (13, 200):
        monkeypatch.setattr(kmeans, "BLOCK", block)
        assert bits_of(spherical(rows, uids, num_clusters=20)) == bits
    monkeypatch.setattr(kmeans, "_rounded", lambda rows: rows)  # the twin: without the grid
    assert len({permuted(seed) for seed in range(3)}) == 3


PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_kmeans import bits_of, rows_of, spherical
for threads in (1, 2):
    torch.set_num_threads(threads)
    print(bits_of(spherical(*rows_of(2000, dim=96), seed=4)))
"""


def test_threads_and_processes_change_no_bit():
    command = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__)]
    ended = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=300, check=True
    )
    assert ended.stdout.split() == [bits_of(spherical(*rows_of(2000, dim=96), seed=4))] * 2
    assert ended.stdout.split()[0] != bits_of(spherical(*rows_of(2000, dim=96), seed=5))  # the twin


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_rows=st.integers(3, 40), num_probed=st.integers(1, 5), block=st.integers(1, 9))
def test_of_equally_near_centroids_the_lower_number_stands_first(data, num_rows, num_probed, block):
    axes = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0) * np.array([1, -1] * 3, np.float32)[:, None]
    rows = axes[data.draw(st.lists(st.integers(0, 5), min_size=num_rows, max_size=num_rows))]
    num_clusters = data.draw(st.integers(1, num_rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "BLOCK", block)
        found = spherical(rows, rows_of(num_rows)[1], num_clusters=num_clusters, num_probed=num_probed)
    cosines = rows @ found.centroids_KD.T
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :num_probed]
    assert np.array_equal(found.nearest, expected)
    assert np.array_equal(found.cosine, cosines.max(axis=1))


def test_a_cluster_that_lost_its_rows_takes_the_farthest_of_the_largest():
    rows, uids = rows_of(200)
    rows[:80] = rows[0]
    before = spherical(rows, uids, num_clusters=30, num_iterations=0)
    after = spherical(rows, uids, num_clusters=30, num_iterations=1)
    counts = np.bincount(before.nearest[:, 0], minlength=30)
    empty = np.flatnonzero(counts == 0)
    assert len(empty) > 2  # of the first centroids many are one row
    for number, largest in zip(empty, np.argsort(-counts, kind="stable"), strict=False):
        inside = np.flatnonzero(before.nearest[:, 0] == largest)
        farthest = rows[inside[before.cosine[inside].argmin()]]
        np.testing.assert_allclose(after.centroids_KD[number], farthest, atol=1e-7)
    assert np.bincount(spherical(rows, uids, num_clusters=30).nearest[:, 0], minlength=30).all()


def test_rows_that_are_all_the_same_or_opposite_have_clusters():
    same = np.repeat(rows_of(1)[0], 50, axis=0)
    _, uids = rows_of(50)
    assert (spherical(same, uids, num_clusters=4).nearest[:, 0] == 0).all()
    opposite = same * np.array([1, -1] * 25, np.float32)[:, None]
    single = spherical(opposite, uids, num_clusters=1)  # the mean has no direction: the centroid stays
    assert single.num_iterations == 0 and np.isin(np.abs(single.cosine).round(6), 1).all()
    assert np.bincount(spherical(opposite, uids, num_clusters=2).nearest[:, 0]).tolist() == [25, 25]


def test_it_ends_where_nothing_moves():
    rows, uids = rows_of(300)
    ended = spherical(rows, uids, num_clusters=6, num_iterations=100)
    assert ended.num_iterations < 100
    assert bits_of(ended) == bits_of(spherical(rows, uids, num_clusters=6, num_iterations=ended.num_iterations))
    shorter = spherical(rows, uids, num_clusters=6, num_iterations=ended.num_iterations - 1)
    assert not np.array_equal(ended.centroids_KD, shorter.centroids_KD)


class Watched:
    """Embeddings that note how many rows are asked for at once."""

    def __init__(self, rows):
        self._rows, self.most, self.shape, self.ndim = rows, 0, rows.shape, 2

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, rows):
        found = self._rows[rows]
        self.most = max(self.most, len(found))
        return found


def test_rows_are_read_in_blocks_of_a_mapped_file(tmp_path):
    rows, uids = rows_of(3000)
    half = rows.astype(np.float16)
    np.save(tmp_path / "rows.npy", half)
    mapped = Watched(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert bits_of(spherical(mapped, uids)) == bits_of(spherical(half, uids))
    assert mapped.most == kmeans.BLOCK < len(rows)
    unit = unit_rows(half, slice(0, 3000), "cpu")
    assert (unit.norm(dim=1) - 1).abs().max() < 1e-7  # though float16 is not of length 1:
    assert (torch.from_numpy(half).double().norm(dim=1) - 1).abs().max() > 1e-4


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, 1.02])
def test_a_row_that_is_no_unit_vector_is_named(value):
    rows, uids = rows_of(2000)
    rows[1500] *= value
    with pytest.raises(DataError, match="row 1500 with norm"):
        spherical(rows, uids)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_clusters": 0}, "1 to 50"),
        ({"num_clusters": 51}, "1 to 50"),
        ({"num_probed": 0}, "num_probed from 1"),
        ({"num_iterations": -1}, "num_iterations from 0"),
    ],
)
def test_what_cannot_be_clustered_is_refused(arguments, said):
    rows, uids = rows_of(50)
    with pytest.raises(ConfigError, match=said):
        spherical(rows, uids, **arguments)
    with pytest.raises(ConfigError, match="do not belong together"):
        spherical(rows, uids[1:])
    with pytest.raises(ConfigError, match="nothing to cluster"):
        spherical(rows[:0], uids[:0])


def test_the_default_number_of_clusters():
    expected = {1: 1, 39: 1, 78: 2, 1000: 25, 1600: 40, 10_000: 100, 10**9: 31_623}
    assert {num_rows: default_num_clusters(num_rows) for num_rows in expected} == expected
