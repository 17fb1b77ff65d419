"""Tiled ranking against brute force: ties, duplicates, several captions, any tile. The ranks: `test_world_size`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import brute_force, gallery, same
from torch import Tensor

from vlm_train.evaluation import ranking
from vlm_train.evaluation.ranking import paired_standings


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), num_images=st.integers(1, 12), num_vectors=st.integers(1, 6), tile=st.integers(1, 5))
def test_tiles_count_as_brute_force_does(seed: int, num_images: int, num_vectors: int, tile: int) -> None:
    images, texts, item = gallery(seed, num_images, num_vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ranking.TILE_SIDE, "cpu", tile)
        by_text, by_image = paired_standings(images, texts, item)
    expected_text, expected_image = brute_force(images, texts, item)
    assert same(by_text, expected_text, slice(None)) and same(by_image, expected_image, slice(None))


def test_what_exists_at_once_does_not_grow_with_the_gallery() -> None:
    """Counted in the products that are formed; the twin is the matrix of all scores."""
    sizes: list[int] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, Tensor) else [])
            return out

    images, texts, item = gallery(0, 3000, 3000)
    with Spy():
        paired_standings(images, texts, item)
    limit = max(512 * 512, 5 * len(texts))
    assert max(sizes) <= limit < len(images) * len(texts) / 50
    sizes.clear()
    with Spy():
        _ = images @ texts.T
    assert max(sizes) > limit
