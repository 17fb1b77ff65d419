"""The linear probe's optimum is scikit-learn's, and the sweep finds the strength that a full search finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.evaluation.logistic import best_l2, fit


def problem(num: int = 90, width: int = 6, num_classes: int = 3, noise: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    centres = torch.randn(num_classes, width, generator=generator)
    return F.normalize(centres[labels] + noise * torch.randn(num, width, generator=generator), dim=1), labels


def theirs(features: Tensor, labels: Tensor, l2: float) -> tuple[np.ndarray, np.ndarray]:
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=1 / (l2 * len(labels)), solver="newton-cholesky", tol=1e-12)
    model.fit(features.double().numpy(), labels.numpy())
    return model.coef_, model.intercept_


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_the_optimum_is_that_of_scikit_learn(l2: float) -> None:
    features, labels = problem()
    ours = fit(features, labels, 3, l2)
    weights, bias = theirs(features, labels, l2)
    # measured 1.3e-5; a constant added to every class's bias changes nothing
    np.testing.assert_allclose(ours.weights.numpy(), weights, atol=5e-5)
    np.testing.assert_allclose(ours.bias - ours.bias.mean(), bias - bias.mean(), atol=5e-5)
    twin, _ = theirs(features, labels, 1.1 * l2)
    assert np.abs(ours.weights.numpy() - twin).max() > 1e-3


def test_the_sweep_ends_on_a_peak() -> None:
    features, labels = problem(width=20, noise=2.0)
    held_out = torch.arange(len(labels)) % 5 == 1
    chosen = best_l2(features, labels, held_out, 3)

    def right(l2: float) -> int:
        scores = fit(features[~held_out], labels[~held_out], 3, l2).scores(features[held_out])
        return int((scores.argmax(1) == labels[held_out]).sum())

    step = 10 ** (1 / 8)
    assert right(chosen) >= max(right(chosen * step), right(chosen / step), right(1e6))
    assert right(chosen) > right(1e-6)  # nothing held back: the twin
