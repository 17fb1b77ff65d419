"""An order of feature vectors in which neighbours are alike, in O(N d log N) time and without a matrix of N x N.

The rows are cut in two halves at the median along their principal direction (Boley, "Principal direction divisive
partitioning", Data Mining and Knowledge Discovery 1998; at the median, so that the depth is log2 of their number), and
the halves again. Of two halves the one that is nearer to where the order stands comes first. What is small enough is
passed through from each row to the nearest that is left. Nothing is drawn, so equal features give an equal order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]

_LEAF = 1024  # a matrix of 4 MB; 64 rows take as long and give farther neighbours (scripts/bench/walk.py)
_SAMPLE = 2048  # rows that tell the direction of a cell
_ITERATIONS = 8


def order_alike(features: Features) -> NDArray[np.int64]:
    """Where each row of the new order came from [N]; `features` [N, D], unit rows, are brought into it in place."""
    rows = np.arange(len(features))
    cells = [(0, len(features))] if len(features) else []
    while cells:
        start, stop = cells.pop()
        cell, before = features[start:stop], features[max(start - 1, 0)]
        if stop - start <= _LEAF:
            order = _chain(cell, before)
        else:
            order = _along_direction(cell, before)
            middle = (start + stop) // 2
            cells += [(middle, stop), (start, middle)]
        rows[start:stop] = rows[start:stop][order]
        features[start:stop] = cell[order]
    return rows


def cosines(features: Features) -> tuple[float, float]:
    """(mean cosine of neighbours, mean cosine of any two) of unit rows [N, D] with N above 1."""
    num = len(features)
    neighbours = np.einsum("nd,nd->n", features[1:], features[:-1]).mean(dtype=np.float64)
    total = features.sum(axis=0, dtype=np.float64)
    return float(neighbours), float((total @ total - num) / (num * (num - 1)))


def _along_direction(cell: Features, before: Features) -> NDArray[np.int64]:
    """The rows by their place along the principal direction; from the end that `before` is nearer to."""
    sample = cell[:: -(-len(cell) // _SAMPLE)]
    sample = sample - sample.mean(axis=0)
    direction = sample[np.square(sample).sum(axis=1).argmax()]
    for _ in range(_ITERATIONS):
        direction = (sample @ direction) @ sample
        direction = direction / max(float(np.linalg.norm(direction)), np.finfo(np.float32).tiny)
    places = cell @ direction
    order = places.argsort(kind="stable")
    return order[::-1] if before @ direction > places[order[len(order) // 2]] else order


def _chain(cell: Features, before: Features) -> NDArray[np.int64]:
    """From `before` to the nearest row, and on to the nearest that is left."""
    cosines = cell @ cell.T
    order, taken = np.empty(len(cell), np.int64), np.zeros(len(cell), np.float32)
    here = int((cell @ before).argmax())
    for place in range(len(cell)):
        order[place], taken[here] = here, np.inf
        here = int((cosines[here] - taken).argmax())
    return order
