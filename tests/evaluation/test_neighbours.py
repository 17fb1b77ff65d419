"""Votes and class means against plain loops; ties share what there is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.evaluation.metrics import exact
from vlm_train.evaluation.neighbours import class_means, place_in_class, votes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    num_vectors=st.integers(1, 5),
    k=st.integers(1, 10),
)
def test_votes_are_the_mean_over_all_orders_of_equal_neighbours(
    seed: int, labels: list[int], num_vectors: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = exact(F.normalize(torch.randn(num_vectors, 4, generator=generator), dim=1))
    gallery = vectors[torch.randint(0, num_vectors, (len(labels),), generator=generator)]
    query = exact(F.normalize(torch.randn(1, 4, generator=generator), dim=1))
    found = votes(query, gallery, torch.tensor(labels), 3, ks=(k,), temperature=0.5)
    scores = (gallery @ query[0]).tolist()
    places, plain, weighted = min(k, len(labels)), [0.0] * 3, [0.0] * 3
    for score, label in zip(scores, labels, strict=True):
        above, equal = sum(other > score for other in scores), scores.count(score)
        share = min(max(places - above, 0), equal) / equal  # of the orders, in which it is among the k
        plain[label] += share
        weighted[label] += share * math.exp((score - max(scores)) / 0.5)
    assert found[f"k={k} plain"][0].tolist() == pytest.approx(plain, abs=1e-10)
    assert found[f"k={k} weighted"][0].tolist() == pytest.approx(weighted, abs=1e-10)
    assert sum(found[f"k={k} plain"][0].tolist()) == pytest.approx(places, abs=1e-10)


def test_the_order_of_the_training_images_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = exact(F.normalize(torch.randn(40, 8, generator=generator), dim=1))
    labels = torch.arange(40) % 3
    order = torch.randperm(40, generator=generator)
    alone = votes(vectors, vectors, labels, 3, ks=(5,), temperature=0.07)
    mixed = votes(vectors, vectors[order], labels[order], 3, ks=(5,), temperature=0.07)
    assert all(torch.equal(alone[name], mixed[name]) for name in alone)
    # the twin: the same sums without steps depend on it
    weights = (vectors @ vectors.T / 0.07).exp()
    assert not torch.equal(weights.sum(1), weights[:, order].sum(1))


def test_class_means_are_of_as_many_images_as_asked() -> None:
    labels = torch.tensor([1, 0, 1, 1, 2, 1])
    features = torch.eye(6, dtype=torch.float64)
    drawn = set()
    for seed in range(40):
        means = class_means(features, labels, 3, shots=2, seed=seed)
        assert torch.equal(means[0], features[1]) and torch.equal(means[2], features[4])  # all that there is
        used = means[1].nonzero().flatten().tolist()
        assert len(used) == 2 and set(used) <= {0, 2, 3, 5} and means[1, used[0]] == pytest.approx(2**-0.5)
        drawn.add(tuple(used))
        assert torch.equal(means, class_means(features, labels, 3, shots=2, seed=seed))
    assert len(drawn) == 6  # every pair comes up
    assert place_in_class(labels).tolist() == [0, 0, 1, 2, 0, 3]
