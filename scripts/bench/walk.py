"""How long an order takes in which neighbours are alike, in what memory, and how near its neighbours are.

    python scripts/bench/walk.py                     100,000 vectors of 64 numbers
    python scripts/bench/walk.py --full              a million
    python scripts/bench/walk.py --num N --width D

Two kinds of unit vectors: in clusters, as what a trained model makes of pictures; and drawn at random, where nothing is
to be found (the worst case). Memory is what a process of its own grows by, beyond the vectors; the bar is one more copy
of them and 64 MB. Nearness is the mean cosine of neighbours as a share of that of the true nearest, of 500 vectors
against all; the control is the order in which the vectors were drawn. The last row is the hardest wrong answer in a
batch of 1,024 that consists of groups of 8; the control is a shuffled batch. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, report

from vlm_train.data import bisection
from vlm_train.data.grouped import GroupedOrder, Groups
from vlm_train.data.order import WindowedOrder
from vlm_train.data.selection import Selection
from vlm_train.data.walk import Walk

KINDS = ("clusters", "random")
BATCH, SIZE, NUM_BATCHES, NUM_QUERIES = 1024, 8, 8, 500
NEARNESS = {"clusters": 0.85, "random": 0.6}
SECONDS_PER_MILLION = 60
HARDEST = {"clusters": 0.9, "random": 0.78}
ROOM_MB = 64
CHUNK = 1 << 14
SMALL_LEAF = 64


def vectors(kind: str, num: int, width: int) -> np.ndarray:
    """Unit rows [num, width]; in clusters of about 50, which lie in clusters of 40 clusters."""
    draw = np.random.default_rng(0)
    coarse = draw.standard_normal((max(1, num // 2000), width), dtype=np.float32)
    fine = 0.7 * draw.standard_normal((max(1, num // 50), width), dtype=np.float32)
    fine += coarse[draw.integers(0, len(coarse), len(fine))]
    found = np.empty((num, width), np.float32)
    for start in range(0, num, CHUNK):  # a chunk at a time, so that making them takes no more memory than they do
        some = found[start : start + CHUNK]
        draw.standard_normal(out=some, dtype=np.float32)
        if kind == "clusters":
            some *= 0.5
            some += fine[draw.integers(0, len(fine), len(some))]
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    return found


def nearest(features: np.ndarray) -> float:
    """Mean cosine of some vectors with the nearest of all others."""
    queries = np.random.default_rng(1).choice(len(features), min(NUM_QUERIES, len(features)), replace=False)
    scores = features[queries] @ features.T
    scores[np.arange(len(queries)), queries] = -1
    return float(scores.max(axis=1).mean())


def hardest(features: np.ndarray, rows: np.ndarray) -> float:
    """Mean cosine of the most similar other sample, in batches of these rows."""
    batches = features[rows.reshape(-1, BATCH)]
    scores = batches @ batches.transpose(0, 2, 1)
    scores[:, np.arange(BATCH), np.arange(BATCH)] = -1
    return float(scores.max(axis=2).mean())


def measure(kind: str, num: int, width: int, leaf: int) -> dict[str, float]:
    """Runs in a process of its own."""
    bisection._LEAF = leaf
    features = vectors(kind, num, width)
    drawn, _ = bisection.cosines(features)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    rows = bisection.order_alike(features)
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found, _ = bisection.cosines(features)
    features[rows] = features.copy()  # as they were drawn
    common = {"selection": Selection.all(num), "shard_starts": np.linspace(0, num, 17).astype(np.int64), "seed": 0}
    orders = (
        GroupedOrder(groups=Groups(walk=Walk(rows), size=SIZE), wraps=True, **common),
        WindowedOrder(shuffle_window=64, **common),
    )
    grouped, shuffled = (hardest(features, order.rows(0, np.arange(NUM_BATCHES * BATCH))) for order in orders)
    return {"seconds": seconds, "megabytes": grown, "found": found, "drawn": drawn, "nearest": nearest(features),
            "grouped": grouped, "shuffled": shuffled}  # fmt: skip


def in_own_process(*arguments: object) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--full", action="store_true", help="a million vectors")
    parser.add_argument("--num", type=int, metavar="N")
    parser.add_argument("--width", type=int, metavar="D", default=64)
    options = parser.parse_args()
    num, width = options.num or (1_000_000 if options.full else 100_000), options.width
    rows = []
    for kind in KINDS:
        small, large = (in_own_process(kind, num, width, leaf) for leaf in (SMALL_LEAF, bisection._LEAF))
        for leaf, one in ((SMALL_LEAF, small), (bisection._LEAF, large)):
            print(f"{kind}, leaves of {leaf}: {one['seconds']:.1f} s, cosine of neighbours {one['found']:.3f}, "
                  f"of the nearest {one['nearest']:.3f}")  # fmt: skip
        copy_mb, name = 4 * num * width / 1e6, f"{num:,} x {width}, {kind}"
        seconds, share = SECONDS_PER_MILLION * num * width / 64e6, large["nearest"]
        rows += [
            Row(claim=f"{name}: processor seconds", value=large["seconds"], bar=seconds, sense="<="),
            Row(claim=f"{name}: MB beyond the vectors", value=large["megabytes"], bar=copy_mb + ROOM_MB, sense="<="),
            Row(claim=f"{name}: nearness of neighbours", value=large["found"] / share, bar=NEARNESS[kind], sense=">=",
                control=large["drawn"] / share),
            Row(claim=f"{name}: hardest cosine in a batch", value=large["grouped"],
                bar=HARDEST[kind] * share, sense=">=", control=large["shuffled"]),
        ]  # fmt: skip
    return report(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
