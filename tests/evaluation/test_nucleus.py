"""Tokens drawn by given numbers: from the nucleus, as often as they are likely, and for each row by its own number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TopPLogitsWarper
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm_train.errors import ConfigError
from vlm_train.evaluation.nucleus import KeyedNucleus, draw, drawn_by

NUM, STEPS = 5, 4000


def logits(num: int = NUM, vocabulary: int = 12) -> torch.Tensor:
    return 2 * torch.randn(num, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_a_token_is_drawn_as_often_as_it_is_likely_in_the_nucleus(top_p: float) -> None:
    rows = logits()
    grid = (torch.arange(STEPS, dtype=torch.float64) + 0.5) / STEPS
    drawn = torch.stack([draw(rows, grid[step].expand(NUM), top_p) for step in range(STEPS)])
    share = torch.stack([(drawn == token).double().mean(0) for token in range(rows.shape[1])], dim=1)
    wanted = TopPLogitsWarper(top_p)(None, rows).softmax(1).double() if top_p < 1 else rows.softmax(1).double()
    assert (share - wanted).abs().max() < 1.01 / STEPS  # an interval holds so many points of a grid, give or take one
    assert ((share > 0) <= (wanted > 0)).all()
    if top_p < 1:
        assert (share - rows.softmax(1)).abs().max() > 0.01  # the twin: all tokens


def test_rows_and_steps_have_numbers_of_their_own() -> None:
    rows, uniforms = logits(), np.random.default_rng(0).random((NUM, 3))
    nucleus = KeyedNucleus(uniforms, temperature=0.7, top_p=0.8)
    for step in range(3):
        scores = nucleus(None, rows)
        assert torch.isfinite(scores).sum() == NUM  # one token of each row is left
        alone = [
            KeyedNucleus(uniforms[row : row + 1, step:], temperature=0.7, top_p=0.8)(None, rows[row : row + 1]).argmax()
            for row in range(NUM)
        ]
        assert scores.argmax(1).tolist() == [int(each) for each in alone]
    with pytest.raises(ConfigError, match="no numbers"):
        nucleus(None, rows)
    with pytest.raises(ConfigError, match="no numbers"):
        KeyedNucleus(uniforms, temperature=1.0, top_p=0.9)(None, rows[:2])


def test_a_cold_temperature_takes_the_likeliest() -> None:
    nucleus = KeyedNucleus(np.full((NUM, 1), 0.99), temperature=0.01, top_p=0.9)
    assert nucleus(None, logits()).argmax(1).equal(logits().argmax(1))


class Network(nn.Module):
    def forward(self) -> Any:
        return CausalLMOutputWithPast(logits=logits()[:, None].repeat(1, 2, 1))


def test_a_network_draws_within_and_not_behind() -> None:
    network, uniforms = Network(), np.full((NUM, 1), 0.999)
    with drawn_by(network, KeyedNucleus(uniforms, temperature=1.0, top_p=1.0)):
        drawn = network().logits
    assert drawn.shape == (NUM, 1, 12) and not drawn[:, -1].argmax(1).equal(logits().argmax(1))
    with drawn_by(network, None):
        assert network().logits[:, -1].equal(logits())
    assert network().logits[:, -1].equal(logits())
