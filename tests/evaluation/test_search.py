"""Search ranks as brute force does, and says what it could not use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm_train.errors import DataError, VlmError
from vlm_train.evaluation import search as module
from vlm_train.evaluation.search import Index, index_pictures, search
from vlm_train.types import Batch


class FirstPixels:
    """The feature of an image is its first three bytes, scaled to length 1."""

    def images(self, batch: Batch) -> Tensor:
        return F.normalize(batch["images"][:, :, 0, 0].float(), dim=1)

    def texts(self, texts) -> Tensor:
        raise NotImplementedError


def load_all_but(bad: set[int]):
    def load(number: int) -> np.ndarray:
        if number in bad:
            raise DataError("image_truncated") if number % 2 else OSError(5, "Input/output error")
        return np.full((2, 2, 3), (number % 250 + 1, 7, number // 250 + 1), np.uint8)

    return load


@given(num=st.integers(1, 200), bad=st.sets(st.integers(0, 199)))
def test_every_picture_is_in_the_index_or_told(num: int, bad: set[int]) -> None:
    bad = {number for number in bad if number < num}
    ticks: list[tuple[int, int]] = []
    if len(bad) == num:
        with pytest.raises(DataError, match="not one picture"):
            index_pictures(FirstPixels(), load_all_but(bad), num, lambda *_: None)
        return
    index = index_pictures(FirstPixels(), load_all_but(bad), num, lambda done, total: ticks.append((done, total)))
    assert index.pictures == [number for number in range(num) if number not in bad]
    assert dict(index.unusable) == {n: "image truncated" if n % 2 else "Input/output error" for n in bad}
    expected = F.normalize(torch.tensor([[n % 250 + 1.0, 7.0, n // 250 + 1.0] for n in index.pictures]), dim=1)
    assert torch.equal(index.features, expected) and ticks[-1] == (num, num)


@given(num=st.integers(1, 40), num_hits=st.integers(1, 50), seed=st.integers(0, 99))
def test_hits_are_those_of_brute_force(num: int, num_hits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(num, 5, generator=generator), dim=1)
    texts = F.normalize(torch.randn(3, 5, generator=generator), dim=1)
    index = Index(features=features, pictures=[number * 2 for number in range(num)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_PER_TILE", 7)
        found = search(index, texts, num_hits)
    for text, hits in zip(texts, found, strict=True):
        scores = features.double() @ text.double()
        assert [hit.picture for hit in hits] == [2 * row for row in scores.argsort(descending=True).tolist()][:num_hits]
        assert [hit.score for hit in hits] == pytest.approx(
            scores.sort(descending=True).values[:num_hits].tolist(), abs=1e-7
        )


def test_equal_pictures_are_listed_in_gallery_order() -> None:
    row = F.normalize(torch.ones(1, 3), dim=1)
    index = Index(features=row.repeat(50, 1), pictures=list(range(50)))
    assert [hit.picture for hit in search(index, row, 50)[0]] == list(range(50))


def test_features_that_are_no_numbers_are_refused() -> None:
    index = Index(features=torch.full((2, 3), torch.nan), pictures=[0, 1])
    with pytest.raises(VlmError, match="cannot be ranked"):
        search(index, F.normalize(torch.ones(1, 3), dim=1), 1)
