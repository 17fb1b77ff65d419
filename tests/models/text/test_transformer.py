"""The text tower: padding never changes a text's vector, except where SigLIP says it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_train.errors import ConfigError
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.types import TextSpec

SPEC = TextSpec(vocab_size=50, context_length=12, pad_id=47, bos_id=48, eos_id=49)
FULL = TextSpec(vocab_size=50, context_length=12, pad_id=47, bos_id=48, eos_id=49, pad_to_max=True)


def make_text(*, spec: TextSpec = SPEC, **changes: Any) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(spec=spec, **{"width": 16, "num_layers": 2, "num_heads": 2, **changes}).double()


def batch_of(texts: list[list[int]], length: int, pad_id: int = 47) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(texts), length), pad_id)
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        words = [48, *text, 49]
        ids[row, : len(words)] = torch.tensor(words)
        mask[row, : len(words)] = True
    return ids, mask


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 46), max_size=6), min_size=1, max_size=4),
    st.sampled_from([("eos", True), ("eos", False), ("mean", True), ("mean", False), ("cls", True)]),
    st.integers(0, 49),
)
def test_padding_never_changes_a_text(texts: list[list[int]], kind: tuple[str, bool], pad_id: int) -> None:
    tower = make_text(pool=kind[0], causal=kind[1])
    shortest = max(len(text) for text in texts) + 2
    reference = tower(*batch_of(texts, shortest))
    assert torch.allclose(tower(*batch_of(texts, 12, pad_id)), reference, atol=1e-12)  # longer, any padding id
    alone = torch.cat([tower(*batch_of([text], len(text) + 2)) for text in texts])
    assert torch.allclose(alone, reference, atol=1e-12)


def test_a_forgotten_mask_is_seen() -> None:
    ids, mask = batch_of([[3, 4]], 12)
    for pool in ("eos", "mean"):
        tower = make_text(pool=pool, causal=False)
        assert not torch.allclose(tower(ids, torch.ones_like(mask)), tower(ids, mask), atol=1e-6)


def test_the_first_end_token_is_read() -> None:
    tower = make_text()
    ids, mask = batch_of([[3, 4]], 6, pad_id=49)  # padded with the end token itself
    assert torch.equal(tower(ids, mask), tower(*batch_of([[3, 4]], 6)))
    late = ids.clone()
    late[0, 3] = 7
    assert not torch.allclose(tower(late, mask), tower(ids, mask), atol=1e-6)


def test_a_causal_text_does_not_see_what_comes_after_its_end() -> None:
    tower = make_text()
    ids, mask = batch_of([[3, 4]], 8)
    other = ids.clone()
    other[0, 5:] = 11
    assert torch.equal(tower(ids, mask), tower(other, mask))


def test_pooling_the_last_position_reads_the_padding_and_needs_all_of_it() -> None:
    tower = make_text(spec=FULL, pool="last", causal=False)
    ids, mask = batch_of([[3, 4]], 12)
    assert not torch.allclose(tower(ids, mask), tower(*batch_of([[3, 4]], 12, pad_id=5)), atol=1e-6)
    with pytest.raises(ConfigError, match="does not have the length"):
        tower(ids[:, :8], mask[:, :8])
    with pytest.raises(ConfigError, match="padded to the full length"):
        make_text(pool="last", causal=False)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 12"):
        make_text()(*batch_of([[1] * 12], 14))
    with pytest.raises(ConfigError, match="which only a causal tower"):
        make_text(pool="cls", causal=False)
    with pytest.raises(ConfigError, match="unknown pooling"):
        make_text(pool="max")
    same = TextSpec(vocab_size=50, context_length=12, pad_id=49, bos_id=49, eos_id=49)
    with pytest.raises(ConfigError, match="the one it begins with"):
        make_text(spec=same)
