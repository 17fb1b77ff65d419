"""Pairs of near codes that agree in a band: against a loop over all pairs, equal codes and flat ones included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation.candidates import BAND_BITS, BANDS, VIEW_RADIUS, near_pairs
from vlm_train.curation.hamming_passes import Pass

FEW = [Pass(tuple(range(start, start + 20))) for start in (0, 60, 200)]


def by_loops(codes: np.ndarray, radius: int, bands: list[Pass] | None) -> set[tuple[int, int]]:
    bits = np.unpackbits(codes.astype(">u8").view(np.uint8).reshape(len(codes), -1), axis=1)
    found = set()
    for i, one in enumerate(bits):
        for j, other in enumerate(bits[:i]):
            agree = one == other
            in_band = bands is None or agree.all() or any(agree[list(band.bits)].all() for band in bands)
            if in_band and (~agree).sum() <= radius and one.any() and other.any():
                found.add((j, i))
    return found


def pairs_of(codes: np.ndarray, radius: int, bands: list[Pass] | None) -> list[tuple[int, int]]:
    blocks = [np.sort(pairs, axis=1).tolist() for pairs in near_pairs(codes, radius, bands)]
    return sorted(tuple(pair) for block in blocks for pair in block)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), has_bands=st.booleans())
def test_all_pairs_are_found_once(seed: int, has_bands: bool) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << 64, (random.integers(1, 12), 4), dtype=np.uint64)
    copies = codes[random.integers(0, len(codes), 25)].copy()
    for number, copy in enumerate(copies):
        for bit in random.choice(256, random.integers(0, 3) * number // 3, replace=False).tolist():
            copy[bit // 64] ^= np.uint64(1 << (63 - bit % 64))
    codes = random.permutation(np.concatenate([codes, copies, np.zeros((3, 4), np.uint64)]))
    bands = FEW if has_bands else None
    assert pairs_of(codes, 12, bands) == sorted(by_loops(codes, 12, bands))


def test_pairs_that_agree_in_no_band_are_given_up() -> None:
    """The twin: without bands they are found."""
    codes = np.random.default_rng(0).integers(0, 1 << 64, (2, 4), dtype=np.uint64)
    codes[1] = codes[0]
    for bit in (3, 70, 210):
        codes[1, bit // 64] ^= np.uint64(1 << (63 - bit % 64))
    assert pairs_of(codes, 12, FEW) == [] and pairs_of(codes, 12, None) == [(0, 1)]


@pytest.mark.parametrize(("num_bits", "share"), [(10, 0.999), (20, 0.97), (VIEW_RADIUS, 0.8)])
def test_bands_find_as_many_as_was_measured(num_bits: int, share: float) -> None:
    """Of codes that differ in bits drawn at random: measured 1, 0.991 and 0.85."""
    random = np.random.default_rng(0)
    differ = np.argsort(random.random((4000, 256)), axis=1) < num_bits
    found = np.zeros(4000, bool)
    for band in BANDS:
        assert len(band.bits) == BAND_BITS
        found |= ~differ[:, list(band.bits)].any(axis=1)
    assert found.mean() >= share
