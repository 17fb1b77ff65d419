"""Several dialogues in one row, so that no place is spent on padding, and none sees another.

1. Each starts at position 0.
2. The mask lets a token read its own dialogue up to itself. Without it, restarting positions alone would let a dialogue
   read those before it (huggingface/nanoVLM#204).
3. What comes out is laid back in rows of one dialogue each, so whoever reads it need not know that rows were packed.

The mask has L^2 entries for each row of L tokens, which is for dense attention: kernels that take lengths in place of a
mask run on GPUs only and are not used yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The dialogues of each row, by index: longest first, each where the least room is left over, else in a new row.

    A row has at most `max_tokens` tokens; a dialogue that is longer has a row of its own. Equal lengths go by index,
    equal room by row, so the same lengths give the same rows.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [row for row, left in enumerate(room) if left >= lengths[index]]
        if not fitting:
            rows.append([])
            room.append(max_tokens)
            fitting = [len(rows) - 1]
        best = min(fitting, key=lambda row: (room[row], row))
        rows[best].append(index)
        room[best] -= lengths[index]
    return rows


class Packed:
    """Where each token of a batch of dialogues lies in packed rows.

    Args:
        lengths: tokens of each dialogue, B numbers.
        rows: the dialogues of each row, R lists of indexes, as of `pack_rows`.
        device: where the tensors will be.

    Attributes: `positions_RL` int64, the place of each token in its dialogue, 0 on padding; `mask` bool [R, 1, L, L],
    True where the second may be read at the first. Padding reads padding, so that no softmax is over nothing. L is the
    length of the fullest row.
    """

    def __init__(self, lengths: Sequence[int], rows: Sequence[Sequence[int]], *, device: torch.device) -> None:
        order = [index for row in rows for index in row]
        totals = [sum(lengths[index] for index in row) for row in rows]
        self.shape = len(rows), max(totals, default=0)
        self.num_dialogues = len(lengths)
        sizes = torch.tensor([lengths[index] for index in order], dtype=torch.int64)
        first_in_row = [
            row * self.shape[1] + sum(lengths[index] for index in members[:number])
            for row, members in enumerate(rows)
            for number in range(len(members))
        ]
        starts = torch.tensor(first_in_row, dtype=torch.int64).repeat_interleave(sizes)
        positions = torch.arange(len(starts)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        dialogues = torch.tensor(order, dtype=torch.int64).repeat_interleave(sizes)
        # of each token: its dialogue, its place there, and its place among all places of the rows
        self._dialogues, self._positions, self._slots = torch.stack([dialogues, positions, starts + positions]).to(
            device, non_blocking=True
        )
        self.positions_RL = self._spread(self._positions, fill=0)
        owner_RL = self._spread(self._dialogues, fill=-1)
        same_RLL = owner_RL[:, :, None] == owner_RL[:, None, :]
        self.mask = same_RLL.tril()[:, None]

    def _spread(self, values_N: Tensor, *, fill: int) -> Tensor:
        flat = values_N.new_full((self.shape[0] * self.shape[1],), fill)
        return flat.index_copy(0, self._slots, values_N).view(self.shape)

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Dialogues [B, T, D], padding behind them -> rows [R, L, D], zeros where none is."""
        places = self._dialogues * x_BTD.shape[1] + self._positions
        tokens_ND = x_BTD.flatten(0, 1).index_select(0, places)
        rows_ND = tokens_ND.new_zeros(self.shape[0] * self.shape[1], x_BTD.shape[-1])
        return rows_ND.index_copy(0, self._slots, tokens_ND).unflatten(0, self.shape)

    def unpack(self, hidden_RLD: Tensor, *, num_tokens: int) -> Tensor:
        """Rows [R, L, D] -> dialogues [B, T, D] with T = `num_tokens`, zeros behind each."""
        places = self._dialogues * num_tokens + self._positions
        tokens_ND = hidden_RLD.flatten(0, 1).index_select(0, self._slots)
        flat_ND = tokens_ND.new_zeros(self.num_dialogues * num_tokens, hidden_RLD.shape[-1])
        return flat_ND.index_copy(0, places, tokens_ND).unflatten(0, (self.num_dialogues, num_tokens))
