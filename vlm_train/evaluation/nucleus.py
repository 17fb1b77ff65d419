"""Drawing tokens by numbers that are given, so that what a row says does not depend on its neighbours in the batch.

torch's generator gives the numbers of a batch to its rows in turn: another batch, another text. Here each row brings a
number for each of its tokens. A token is drawn from the nucleus (Holtzman et al. 2020, arXiv 1904.09751), the likeliest
tokens that together have probability `top_p`, by inverting their distribution in the order of the vocabulary: there
two tokens that are almost equally likely cannot change places, as they can in the order of probability.

The logits of a row still differ in their last bits between batches of different sizes, so a number that lies within
these of a border between two tokens may fall to either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LogitsProcessor

from vlm_train.errors import ConfigError


class KeyedNucleus(LogitsProcessor):
    """Draws the next token of each row, one call for each step of a generation.

    Args:
        uniforms: [N, T] in [0, 1): for each row the number of each of its tokens.
        temperature: above 0; below 1 likely tokens become likelier.
        top_p: above 0, at most 1.
    """

    def __init__(self, uniforms: NDArray[np.float64], *, temperature: float, top_p: float) -> None:
        self._uniforms, self._temperature, self._top_p, self._step = uniforms, temperature, top_p, 0

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Logits [N, V] that greedy decoding reads as the token that was drawn; `input_ids` are not looked at.

        Raises:
            ConfigError: of other rows, or more steps, than there are numbers for.
        """
        if scores.shape[0] != len(self._uniforms) or self._step >= self._uniforms.shape[1]:
            raise ConfigError(
                "tokens are drawn for rows that have no numbers",
                got=f"{scores.shape[0]} rows, step {self._step + 1}",
                allowed=f"{self._uniforms.shape[0]} rows, {self._uniforms.shape[1]} steps",
            )
        uniforms_N = torch.from_numpy(self._uniforms[:, self._step].copy()).to(scores.device)
        self._step += 1
        drawn_N = draw(scores.float() / self._temperature, uniforms_N, self._top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_N[:, None], 0.0)


def draw(logits_NV: Tensor, uniforms_N: Tensor, top_p: float) -> Tensor:
    """The token of each row, int64 [N]: where `uniforms_N`, fp64 in [0, 1), falls in the distribution of a nucleus."""
    probabilities_NV = logits_NV.softmax(dim=1)
    descending_NV, order_NV = probabilities_NV.sort(dim=1, descending=True, stable=True)
    before_NV = descending_NV.double().cumsum(dim=1) - descending_NV
    kept_NV = torch.zeros_like(probabilities_NV, dtype=torch.bool).scatter_(1, order_NV, before_NV < top_p)
    cumulative_NV = (probabilities_NV.double() * kept_NV).cumsum(dim=1)
    wanted_N1 = (uniforms_N * cumulative_NV[:, -1])[:, None]
    return torch.searchsorted(cumulative_NV, wanted_N1, right=True).squeeze(1)


@contextmanager
def drawn_by(network: nn.Module, nucleus: KeyedNucleus | None) -> Iterator[None]:
    """Within it, greedy decoding with a language model of transformers draws by `nucleus`; None leaves it greedy."""
    if nucleus is None:
        yield
        return

    def drawn(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = nucleus(None, output.logits[:, -1])[:, None]
        return output

    handle = network.register_forward_hook(drawn)
    try:
        yield
    finally:
        handle.remove()
