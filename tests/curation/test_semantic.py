import itertools
import math
from dataclasses import replace

import dedup
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import kmeans, semantic
from vlm_train.curation.kmeans import Clusters, spherical
from vlm_train.curation.semantic import nearest_leaders, nearest_of, pairs_of, removed_by_leaders
from vlm_train.errors import ConfigError

EPS = [0.002, 0.01, 0.05, 0.2]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rows_of(num_rows, dim=16, seed=0):
    """(float32 unit rows, uids): topics that touch, and copies of copies at distances of 0.0005 to 0.1."""
    rng = np.random.default_rng(seed)
    rows = list(rng.standard_normal((8, dim))[rng.integers(8, size=num_rows)] + rng.standard_normal((num_rows, dim)))
    for number in range(num_rows // 3, num_rows):  # chains, for the source may be a copy
        rows[number] = rows[rng.integers(number)] + 10 ** rng.uniform(-1.5, -0.3) * rng.standard_normal(dim)
    shuffled = rng.permutation(num_rows)
    return unit(np.stack(rows))[shuffled], rng.integers(256, size=(num_rows, 16), dtype=np.uint8)


def stands_before(rows, uids, clusters, keep):
    """before(a, b) for rows, by the words of the paper: by the distance from the own centroid; ties by uid."""
    wide = rows.astype(np.float64)
    near = [float(row @ own) for row, own in zip(wide, clusters.centroids_KD[clusters.nearest[:, 0]], strict=True)]
    keys = [(value if keep == "hard" else -value, bytes(uid)) for value, uid in zip(near, uids, strict=True)]
    return lambda a, b: keys[a] < keys[b]


def paper_by_loops(rows, uids, clusters, eps, keep="hard", seen=lambda before: before):
    """SemDeDup in plain loops: each cluster sorted, its matrix of cosines, the largest above the diagonal.

    `seen` says which entries count; the twin counts those below the diagonal too.
    """
    before = stands_before(rows, uids, clusters, keep)
    removed = np.zeros(len(rows), bool)
    for number in range(len(clusters.centroids_KD)):
        inside = [row for row in range(len(rows)) if clusters.nearest[row, 0] == number]
        line = sorted(inside, key=lambda row: sum(before(other, row) for other in inside))
        for place, row in enumerate(line):
            others = [other for at, other in enumerate(line) if at != place and seen(at < place)]
            cosines = [float(rows[row].astype(np.float64) @ rows[other].astype(np.float64)) for other in others]
            removed[row] = max(cosines, default=-1) > 1 - eps
    return removed


def near_pairs_by_loops(rows, uids, clusters, eps, keep="hard"):
    before = stands_before(rows, uids, clusters, keep)
    looks = [set(numbers.tolist()) for numbers in clusters.nearest]
    found = []
    for a, b in itertools.permutations(range(len(rows)), 2):
        compared = clusters.nearest[a, 0] in looks[b] or clusters.nearest[b, 0] in looks[a]
        near = float(rows[a].astype(np.float64) @ rows[b].astype(np.float64)) > 1 - eps
        if compared and near and before(a, b):
            found.append((a, b))
    return found


def leader_by_loops(pairs, rows, uids, clusters, keep="hard", asks=lambda kept: kept):
    """Row by row in their order; `asks` says whether a row before it counts. The twin counts removed rows too."""
    before = stands_before(rows, uids, clusters, keep)
    removed = np.zeros(len(rows), bool)
    for row in sorted(range(len(rows)), key=lambda row: sum(before(other, row) for other in range(len(rows)))):
        removed[row] = any(second == row and asks(not removed[first]) for first, second in pairs)
    return removed


@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_paper_is_the_published_rule(keep):
    rows, uids = rows_of(300)
    clusters = spherical(rows, uids, num_probed=1)
    nearest = nearest_of(rows, uids, clusters, keep=keep)
    for eps in EPS:
        expected = paper_by_loops(rows, uids, clusters, eps, keep)
        assert np.array_equal(nearest.removed(eps), expected) and expected.any()
        twin = paper_by_loops(rows, uids, clusters, eps, keep, seen=lambda before: True)
        assert not np.array_equal(twin, expected)  # compared with all, both rows of a pair would go


def test_leader_asks_kept_rows_only():
    rows, uids = rows_of(200)
    clusters = spherical(rows, uids, num_clusters=6, num_probed=2)
    differed = 0
    for eps in EPS:
        pairs = pairs_of(rows, uids, clusters, eps)
        expected = near_pairs_by_loops(rows, uids, clusters, eps)
        assert sorted(map(tuple, pairs.tolist())) == sorted(expected)
        removed = removed_by_leaders(pairs, len(rows))
        assert np.array_equal(removed, leader_by_loops(expected, rows, uids, clusters))
        twin = leader_by_loops(expected, rows, uids, clusters, asks=lambda kept: True)
        assert np.array_equal(twin, nearest_of(rows, uids, clusters).removed(eps))  # which is the rule paper
        differed += not np.array_equal(removed, twin)
    assert differed >= 2


def at_angles(*degrees):
    turned = np.radians(degrees)
    return np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)


def clusters_of(rows, centroids, nearest):
    nearest = np.array(nearest, np.int32).reshape(len(rows), -1)
    cosine = (rows.astype(np.float64) * np.asarray(centroids, np.float64)[nearest[:, 0]]).sum(1)
    return Clusters(centroids_KD=np.asarray(centroids, np.float64), nearest=nearest, cosine=cosine, num_iterations=0)


def test_of_a_chain_paper_loses_the_end_and_leader_keeps_it():
    rows = at_angles(40, 30, 20, 0)  # a, b, c ten degrees apart; the centroid at 0
    uids = np.zeros((4, 16), np.uint8)
    clusters = clusters_of(rows, at_angles(0), [0, 0, 0, 0])
    eps = 1 - math.cos(math.radians(11))  # a near b, b near c, a not near c
    assert nearest_of(rows, uids, clusters).removed(eps).tolist() == [False, True, True, False]
    pairs = pairs_of(rows, uids, clusters, eps)
    assert pairs.tolist() == [[0, 1], [1, 2]]
    removed = removed_by_leaders(pairs, 4)
    assert removed.tolist() == [False, True, False, False]
    found = nearest_leaders(rows, pairs, removed)
    assert found.match.tolist() == [-1, 0, -1, -1] and np.isinf(found.similarity[[0, 2, 3]]).all()
    assert abs(found.similarity[1] - math.cos(math.radians(10))) < 1e-6
    easy = nearest_of(rows, uids, clusters, keep="easy")  # from the centroid outwards: c, then b, then a
    assert easy.removed(eps).tolist() == [True, True, False, False] and easy.match.tolist() == [1, 2, 3, -1]


def test_a_near_pair_that_a_border_divides_is_found_by_looking_over_it():
    rows = at_angles(44, 46, 5, 85)
    uids = np.arange(4, dtype=np.uint8)[:, None].repeat(16, 1)
    centroids = at_angles(0, 90)
    over = clusters_of(rows, centroids, [[0, 1], [1, 0], [0, 1], [1, 0]])
    found = nearest_of(rows, uids, over)
    # equally far from their centroids, so that the lower uid stands before
    assert found.removed(0.01).tolist() == [False, True, False, False] and found.match[1] == 0
    within = replace(over, nearest=over.nearest[:, :1])
    assert not nearest_of(rows, uids, within).removed(0.01).any()  # the control: the published way
    one_side = replace(over, nearest=np.array([[0, 1], [1, 1], [0, 0], [1, 1]], np.int32)[:, :2])
    one_side.nearest[1:, 1] = one_side.nearest[1:, 0]  # only the first row looks over the border: that is enough
    assert pairs_of(rows, uids, one_side, 0.01).tolist() == [[0, 1]]


def test_looking_over_borders_finds_what_brute_force_finds():
    rows, uids = dedup.embeddings_of(3000, seed=0)
    expected = dedup.codes_of(dedup.near_pairs(rows, eps=0.03)[0], len(rows))

    def recall(num_probed):
        pairs = pairs_of(rows, uids, spherical(rows, uids, num_probed=num_probed), 0.03)
        found = dedup.codes_of(pairs, len(rows))
        assert np.isin(found, expected).all() and len(np.unique(found)) == len(pairs)
        return len(pairs) / len(expected)

    assert recall(1) < 0.9 < 0.99 <= recall(3)


def results_of(rows, uids, eps=0.03):
    clusters = spherical(rows, uids, num_clusters=12)
    nearest = nearest_of(rows, uids, clusters)
    return nearest.similarity, nearest.match, removed_by_leaders(pairs_of(rows, uids, clusters, eps), len(rows))


def test_the_order_of_rows_and_the_blocks_change_no_bit(monkeypatch):
    rows, uids = rows_of(600)
    similarity, match, removed = results_of(rows, uids)

    def same(order):
        back = order.argsort()
        moved = results_of(rows[order], uids[order])
        named = np.where(moved[1] < 0, -1, order[moved[1]])
        assert moved[0][back].tobytes() == similarity.tobytes()
        assert np.array_equal(named[back], match) and np.array_equal(moved[2][back], removed)

    for seed in range(3):
        same(np.random.default_rng(seed).permutation(600))
    for block in (5, 64):
        monkeypatch.setattr(kmeans, "BLOCK", block)
        monkeypatch.setattr(semantic, "BLOCK", block)
        same(np.arange(600))
    uids = uids[::-1].copy()  # the twin: other uids
    with pytest.raises(AssertionError):
        same(np.arange(600))


def test_a_large_cluster_is_read_in_blocks(monkeypatch):
    rows, uids = rows_of(500)
    clusters = spherical(rows, uids, num_clusters=1)
    read, plain = [], kmeans.unit_rows

    def watched(embeddings, chosen, device):
        read.append(len(chosen))
        return plain(embeddings, chosen, device)

    monkeypatch.setattr(semantic, "unit_rows", watched)
    monkeypatch.setattr(semantic, "BLOCK", 60)
    blocks = nearest_of(rows, uids, clusters)
    assert max(read) == 60 and len(read) == 9 + 9 * 10 // 2  # each block of keys once, and the queries from it on
    monkeypatch.setattr(semantic, "BLOCK", 500)
    whole = nearest_of(rows, uids, clusters)
    assert read[-1] == 500 and np.array_equal(whole.match, blocks.match)


def test_cosines_are_those_of_float64():
    rows, uids = rows_of(1500, dim=512)
    clusters = spherical(rows, uids)
    found = nearest_of(rows, uids, clusters)
    at = np.flatnonzero(found.match >= 0)
    wide = rows.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    exact = (wide[at] * wide[found.match[at]]).sum(1)
    assert np.abs(found.similarity[at] - exact).max() < 1e-7  # measured 5.0e-8; float32 itself rounds by 3e-8
    half = nearest_of(rows.astype(np.float16), uids, clusters)
    assert (
        np.abs(half.similarity[at] - found.similarity[at]).max() < 1e-4
    )  # measured 3.3e-5: what float16 loses of the rows
    before = stands_before(rows, uids, clusters, "hard")
    assert all(before(int(found.match[row]), int(row)) for row in at)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 30), keep=st.sampled_from(["hard", "easy"]), block=st.integers(1, 9))
def test_rules_agree_where_they_must(data, num_rows, keep, block):
    angles = data.draw(st.lists(st.integers(0, 12), min_size=num_rows, max_size=num_rows))  # many equal rows
    rows = at_angles(*(5 * np.array(angles)))
    uids = np.random.default_rng(num_rows).integers(256, size=(num_rows, 16), dtype=np.uint8)
    num_clusters, num_probed = data.draw(st.integers(1, num_rows)), data.draw(st.integers(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "BLOCK", block)
        patch.setattr(semantic, "BLOCK", block)
        clusters = spherical(rows, uids, num_clusters=num_clusters, num_probed=num_probed)
        nearest = nearest_of(rows, uids, clusters, keep=keep)
        paper, larger = nearest.removed(0.01), nearest.removed(0.1)
        pairs = pairs_of(rows, uids, clusters, 0.01, keep=keep)
    assert (paper <= larger).all()
    assert np.array_equal(np.unique(pairs[:, 1]), np.flatnonzero(paper))  # removed: what has a near row before it
    leader = removed_by_leaders(pairs, num_rows)
    assert (leader <= paper).all()
    assert not (~leader[pairs[:, 0]] & ~leader[pairs[:, 1]]).any()  # no two near rows are kept
    assert np.array_equal(np.unique(pairs[~leader[pairs[:, 0]], 1]), np.flatnonzero(leader))  # each has a kept one
    leaders = nearest_leaders(rows, pairs, leader)
    gone = np.flatnonzero(leader)
    assert not leader[leaders.match[gone]].any() and (leaders.similarity[gone].astype(np.float64) > 1 - 0.01).all()
    assert (leaders.similarity[gone] <= nearest.similarity[gone]).all()
    known = set(map(tuple, pairs.tolist()))
    assert all((int(nearest.match[row]), int(row)) in known for row in np.flatnonzero(paper))


def test_a_leader_far_down_a_chain_is_found():
    """Its rows are decided one after the other, in 500 rounds."""
    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)
    assert np.array_equal(removed_by_leaders(chain, 1000), np.arange(1000) % 2 == 1)
    assert not removed_by_leaders(np.empty((0, 2), np.int64), 3).any()


@pytest.mark.parametrize("eps", [0, 1e-7, 1, -0.1, math.nan])
def test_an_eps_that_cannot_be_meant_is_refused(eps):
    rows, uids = rows_of(30)
    clusters = spherical(rows, uids)
    with pytest.raises(ConfigError, match="eps is the distance"):
        nearest_of(rows, uids, clusters).removed(eps)
    with pytest.raises(ConfigError, match="eps is the distance"):
        pairs_of(rows, uids, clusters, eps)


def test_what_does_not_belong_together_is_refused():
    rows, uids = rows_of(30)
    clusters = spherical(rows, uids)
    with pytest.raises(ConfigError, match="29, 30 and 30 rows"):
        nearest_of(rows[1:], uids, clusters)
    with pytest.raises(ConfigError, match="hard or easy"):
        nearest_of(rows, uids, clusters, keep="random")
    same = np.repeat(rows[:1], 30, axis=0)
    with pytest.raises(ConfigError, match="more than 400 pairs"):
        pairs_of(same, uids, spherical(same, uids), 0.01, max_pairs=400)
    assert len(pairs_of(same, uids, spherical(same, uids), 0.01, max_pairs=435)) == 435
