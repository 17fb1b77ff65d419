"""Do near captions meet as often as MinHash promises, and how fast is that beside datasketch.

    python scripts/bench/captions.py               20 thousand captions beside datasketch, 100 thousand in groups
    python scripts/bench/captions.py --full        and 1 million in groups

Captions of 6 to 14 words from 5,000; in a tenth of them stands a copy of another one, with one to three words changed.
Both libraries have the same sets of 5-grams of characters, 112 minima, 14 bands of 8, in one thread; they hash and find
candidates in turns, five times. Of the planted pairs the true Jaccard similarity s is known, and so how many of them a
right MinHash finds: the sum of 1 - (1 - s^8)^14, with the standard deviation of so many throws. The control has half of
the bands.

Groups: hashing, candidates, comparing and leaders, as `vlm-train data prune --max-per-caption` does them, in a fresh
process; no pair that is compared is one that the bands do not give. Needs `pip install datasketch`.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, arguments, report

from vlm_train.curation import leaders, minhash
from vlm_train.curation.captions import SIMILARITY, similarities

NUM_COMPARED, ROUNDS, VOCABULARY, SHARE_PLANTED = 20_000, 5, 5_000, 0.1
NUM_GROUPED, NUM_GROUPED_FULL = 100_000, 1_000_000
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
MOST_DEVIATIONS, LEAST_RATIO, LEAST_RATE, MOST_GB = 4.0, 5.0, 5_000.0, 4.0

Pairs = set[tuple[int, int]]


def main() -> int:
    options = arguments(__doc__)
    texts, planted = write(NUM_COMPARED, seed=0)
    rows = beside_datasketch(texts, planted)
    for number in (NUM_GROUPED, NUM_GROUPED_FULL) if options.full else (NUM_GROUPED,):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rate, gigabytes = pool.submit(grouped, number).result()
        rows.append(Row(claim=f"captions/s put into groups, {number:,}", value=rate, bar=LEAST_RATE, sense=">="))
        rows.append(Row(claim=f"GB, {number:,} captions", value=gigabytes, bar=MOST_GB, sense="<="))
    return report(rows, options.json)


def write(number: int, seed: int) -> tuple[list[str], NDArray[np.int64]]:
    """(captions, pairs [n, 2] of which the second is a copy of the first)."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(LETTERS) + 1)
    letters = random.choice(list(LETTERS), (VOCABULARY, 9), p=weights / weights.sum())
    lengths = random.integers(2, 10, VOCABULARY)
    words = np.array(["".join(row[:length]) for row, length in zip(letters, lengths, strict=True)])
    rows = [random.choice(words, size) for size in random.integers(6, 15, number)]
    planted = random.choice(number, (int(number * SHARE_PLANTED / 2), 2), replace=False)
    for source, copy in planted.tolist():
        rows[copy] = rows[source].copy()
        places = random.choice(len(rows[copy]), random.integers(1, 4), replace=False)
        rows[copy][places] = random.choice(words, len(places))
    return [" ".join(row) for row in rows], planted


def beside_datasketch(texts: list[str], planted: NDArray[np.int64]) -> list[Row]:
    """Rows about what is found of the planted pairs, and how fast."""
    similarity = similarities(pa.array(texts), planted[:, 0], planted[:, 1])
    chance = 1 - (1 - similarity**minhash.NUM_ROWS) ** minhash.NUM_BANDS
    deviation = np.sqrt((chance * (1 - chance)).sum())
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    found: dict[str, Pairs] = {}
    for _ in range(ROUNDS):
        for name, candidates in (("ours", ours), ("theirs", theirs)):
            start = time.process_time()
            found[name] = candidates(texts)
            seconds[name].append(time.process_time() - start)
    found["half"] = ours(texts, minhash.NUM_BANDS // 2)
    numbers = {name: count(pairs, planted) for name, pairs in found.items()}
    off = {name: abs(number - chance.sum()) / deviation for name, number in numbers.items()}
    rate, ratio = len(texts) / statistics.median(seconds["ours"]), ratio_of(seconds)
    print(f"{len(planted):,} pairs are planted, {chance.sum():.0f} of them expected; found: {numbers}")
    return [
        Row(claim="standard deviations from the formula", value=off["ours"], bar=MOST_DEVIATIONS, sense="<=",
            control=off["half"]),
        Row(claim="standard deviations from the formula, datasketch", value=off["theirs"], bar=MOST_DEVIATIONS,
            sense="<="),
        Row(claim="captions/s hashed and bucketed", value=rate, bar=LEAST_RATE, sense=">="),
        Row(claim="times as fast as datasketch", value=ratio, bar=LEAST_RATIO, sense=">="),
    ]  # fmt: skip


def ratio_of(seconds: dict[str, list[float]]) -> float:
    """The median over rounds, each of which has both."""
    return statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))


def count(found: Pairs, planted: NDArray[np.int64]) -> int:
    return sum((min(pair), max(pair)) in found for pair in planted.tolist())


def ours(texts: list[str], num_bands: int = minhash.NUM_BANDS) -> Pairs:
    """Pairs that share a band."""
    bands = minhash.bands(minhash.gram_sets(texts))[:, :num_bands]
    buckets, members = leaders.candidates(bands)
    heads = np.flatnonzero(np.diff(buckets, prepend=-1))
    found: Pairs = set()
    for group in np.split(members, heads[1:]):
        found |= {(a, b) for place, a in enumerate(group.tolist()) for b in group[place + 1 :].tolist()}
    return found


def theirs(texts: list[str]) -> Pairs:
    """The same by datasketch."""
    shape = (minhash.NUM_BANDS, minhash.NUM_ROWS)
    index, found = MinHashLSH(num_perm=shape[0] * shape[1], params=shape), set()
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=shape[0] * shape[1], seed=1)
        sketch.update_batch([text[start : start + minhash.GRAM].encode() for start in range(len(text) - 4)])
        found |= {(other, number) for other in index.query(sketch)}
        index.insert(number, sketch)
    return found


def grouped(number: int) -> tuple[float, float]:
    """(captions a second, peak GB) of putting captions into groups."""
    texts, _ = write(number, seed=1)
    written = pa.array(texts)
    start = time.perf_counter()
    bands = np.concatenate(
        [minhash.bands(minhash.gram_sets(texts[at : at + 10_000])) for at in range(0, number, 10_000)]
    )
    leaders.led(number, *leaders.candidates(bands), lambda a, b: similarities(written, a, b) >= SIMILARITY)
    seconds = time.perf_counter() - start
    return number / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
