"""Which bits of binary codes are held fixed, pass by pass, so that no pair of near codes is missed.

Codes lie as columns: uint64 [W, N], W words of 64 bits for each of N codes; bit 0 is the highest bit of word 0.

A pass looks only at pairs that agree in its fixed bits. The passes of a plan are made so that whichever `radius` bits
two codes differ in, some pass fixes none of them. The bits are cut into slots, and the radius is shared out to the
slots as allowances: the allowances and one more for each slot add up to radius + 1, so two codes that exceed the
allowance of every slot are further apart than the radius (the pigeonhole of Norouzi et al., Fast Exact Search in
Hamming Space with Multi-Index Hashing, https://arxiv.org/abs/1307.2982). A slot with an allowance of f flips is cut
into b > f blocks; f flips touch at most f of them, so for each choice of b - f blocks there is a pass that fixes these
(Manku et al., Detecting Near-Duplicates for Web Crawling, WWW 2007).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, groupby
from math import comb

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

PREFIX_BITS = 32
"""No pass fixes more bits: a prefix and the number of a row fit into one word. Fixing fewer bits misses nothing."""
MAX_PASSES = 700  # of one slot
_PASS, _ROW, _CANDIDATE = 1e5, 130.0, 5.0  # nanoseconds: measured on two cores that others used too
_SAMPLE, _TRIED = 1 << 14, 3


@dataclass(frozen=True)
class Pass:
    """Fixed bits, in rising order."""

    bits: tuple[int, ...]

    @cached_property
    def _runs(self) -> list[tuple[int, np.uint64, np.uint64, np.uint64]]:
        """Neighbouring fixed bits of one word: (word, right shift, mask after that, number of bits)."""
        runs = []
        for (word, _), members in groupby(enumerate(self.bits), lambda item: (item[1] // 64, item[1] - item[0])):
            run = [bit for _, bit in members]
            mask = np.uint64((1 << len(run)) - 1)
            runs.append((word, np.uint64(63 - run[-1] % 64), mask, np.uint64(len(run))))
        return runs

    @cached_property
    def _masks(self) -> list[tuple[int, np.uint64]]:
        words = sorted({bit // 64 for bit in self.bits})
        return [(word, np.uint64(sum(1 << (63 - b % 64) for b in self.bits if b // 64 == word))) for word in words]

    def prefix(self, codes: Words) -> Words:
        """The fixed bits of each code, as a number below 2 ** len(bits): [W, N] -> [N]."""
        found = np.zeros(codes.shape[1], np.uint64)
        for word, shift, mask, num_bits in self._runs:
            found <<= num_bits
            found |= (codes[word] >> shift) & mask
        return found

    def agree(self, codes: Words, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether columns `left` [P] and `right` [P] of codes [W, N] have the same fixed bits: [P]."""
        same = np.ones(len(left), np.bool_)
        for word, mask in self._masks:
            same &= ((codes[word].take(left) ^ codes[word].take(right)) & mask) == 0
        return same


def slots(num_bits: int, radius: int, num_slots: int) -> list[tuple[int, int, int]]:
    """(first bit, bit after the last, allowance) of each slot; the allowances plus num_slots make radius + 1."""
    edges = [num_bits * number // num_slots for number in range(num_slots + 1)]
    least, rest = divmod(radius + 1, num_slots)
    return [(edges[k], edges[k + 1], least - 1 + (k < rest)) for k in range(num_slots)]


def passes_of(start: int, stop: int, flips: int, num_blocks: int) -> list[Pass]:
    """The passes of one slot cut into `num_blocks` blocks: each leaves out `flips` of them."""
    edges = [start + (stop - start) * number // num_blocks for number in range(num_blocks + 1)]
    return [
        Pass(tuple(bit for k in fixed for bit in range(edges[k], edges[k + 1]))[:PREFIX_BITS])
        for fixed in combinations(range(num_blocks), num_blocks - flips)
    ]


def plan(codes: Words, radius: int) -> list[Pass]:
    """Passes that together see every pair of distinct codes [W, N] at most `radius` >= 1 apart.

    The cut is the one that would take the least time, by the number of pairs that passes would look at; these are
    counted on a sample of the codes, for real codes crowd. It depends on the codes and the radius alone.
    """
    num_bits, num_codes = 64 * codes.shape[0], codes.shape[1]
    chosen = np.random.default_rng(0).choice(num_codes, min(num_codes, _SAMPLE), replace=False, shuffle=False)
    sample = np.ascontiguousarray(codes[:, np.sort(chosen)])
    best: list[Pass] = []
    least = np.inf
    for num_slots in range(1, radius + 2):
        cost, passes = 0.0, list[Pass]()
        for slot in slots(num_bits, radius, num_slots):
            slot_cost, slot_passes = min(_ways(sample, num_codes, *slot), key=lambda way: way[0])
            cost, passes = cost + slot_cost, passes + slot_passes
            if cost >= least:
                break
        else:
            best, least = passes, cost
    return best


def _ways(sample: Words, num_codes: int, start: int, stop: int, flips: int) -> Iterator[tuple[float, list[Pass]]]:
    """(cost, passes) of one slot cut into ever more blocks, until that gains nothing."""
    before = np.inf
    for num_blocks in range(flips + 1, stop - start + 1 if flips else 2):
        if num_blocks > flips + 1 and comb(num_blocks, flips) > MAX_PASSES:
            return
        passes = passes_of(start, stop, flips, num_blocks)
        cost = _cost(passes, sample, num_codes)
        yield cost, passes
        if cost >= before:
            return
        before = cost


def _cost(passes: Sequence[Pass], sample: Words, num_codes: int) -> float:
    """Nanoseconds, about, that the passes would take."""
    tried = passes[:: -(-len(passes) // _TRIED)]
    pairs = sum(_num_pairs(each.prefix(sample)) for each in tried) / len(tried)
    pairs *= (num_codes / sample.shape[1]) ** 2
    return len(passes) * (_PASS + num_codes * _ROW + pairs * _CANDIDATE * len(sample))


def _num_pairs(prefixes: Words) -> float:
    """Pairs of equal prefixes."""
    counts = np.unique(prefixes, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / 2)
