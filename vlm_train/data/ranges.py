"""Byte ranges: which requests fetch many small ranges of one file, and how the answers are cut. Pure functions.

A range is (offset, length) in bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.files import Range

MAX_OVERHEAD = 0.15
"""Bytes read in vain for each byte wanted, at most. Every reader of servers holds to it."""
MAX_GAP = 256 * 1024


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as sorted ranges that neither overlap nor touch; empty ranges vanish."""
    blocks: list[Range] = []
    for offset, length in sorted(item for item in ranges if item[1] > 0):
        if blocks and offset <= (end := sum(blocks[-1])):
            blocks[-1] = (blocks[-1][0], max(end, offset + length) - blocks[-1][0])
        else:
            blocks.append((offset, length))
    return blocks


def coalesce(ranges: Iterable[Range], *, max_overhead: float = MAX_OVERHEAD, max_gap: int = MAX_GAP) -> list[Range]:
    """Few requests that together cover the ranges, sorted and disjoint.

    Gaps of at most `max_gap` bytes are read along, the smallest first, while all of them together are at most
    `max_overhead` of the bytes wanted.
    """
    blocks = union(ranges)
    budget = int(max_overhead * sum(length for _, length in blocks))
    gaps = [(after[0] - sum(before), index) for index, (before, after) in enumerate(pairwise(blocks))]
    bridged = set()
    for gap, index in sorted(gaps):
        budget -= gap
        if gap > max_gap or budget < 0:
            break
        bridged.add(index)
    requests: list[Range] = []
    for index, (offset, length) in enumerate(blocks):
        if index - 1 in bridged:
            requests[-1] = (requests[-1][0], offset + length - requests[-1][0])
        else:
            requests.append((offset, length))
    return requests


def cut(ranges: Sequence[Range], requests: Sequence[Range], chunks: Sequence[bytes]) -> list[bytes]:
    """The bytes of each range, in the order of `ranges`, out of the answers to the requests that `coalesce` made."""
    starts = [offset for offset, _ in requests]
    pieces = []
    for offset, length in ranges:
        number = max(bisect_right(starts, offset) - 1, 0)
        start = offset - starts[number] if length else 0
        pieces.append(chunks[number][start : start + length] if length else b"")
    return pieces


def split(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """The same bytes in ranges of at most `size` bytes."""
    for offset, length in ranges:
        for start in range(0, length, size):
            yield offset + start, min(size, length - start)


def batches(ranges: Iterable[Range], size: int) -> Iterator[list[Range]]:
    """The ranges in order, in groups of about `size` bytes."""
    group: list[Range] = []
    for item in ranges:
        group.append(item)
        if sum(length for _, length in group) >= size:
            yield group
            group = []
    if group:
        yield group


def clamp(ranges: Iterable[Range], size: int) -> list[Range]:
    """Each range cut off at the end of a file of `size` bytes."""
    return [(min(offset, size), max(0, min(length, size - offset))) for offset, length in ranges]


def held(ranges: Sequence[Range], present: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which ranges lie wholly inside `present` [N, 2] (start, end), in any order: [len(ranges)]."""
    if not len(ranges) or not len(present):
        return np.array([length == 0 for _, length in ranges], dtype=bool)
    table = present[np.argsort(present[:, 0], kind="stable")].astype(np.int64)
    ends = np.maximum.accumulate(table[:, 1])
    first = np.concatenate(([True], table[1:, 0] > ends[:-1]))  # where a block begins that touches nothing before it
    starts, block_ends = table[first, 0], np.append(ends[np.flatnonzero(first)[1:] - 1], ends[-1])
    wanted = np.array(ranges, dtype=np.int64)
    number = np.searchsorted(starts, wanted[:, 0], side="right") - 1
    inside = (number >= 0) & (block_ends[number] >= wanted.sum(axis=1))
    return inside | (wanted[:, 1] == 0)
