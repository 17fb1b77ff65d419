"""Which rows of a rank's batch run forward together: as few micro-batches as the budgets allow, of even cost.

Samples of a contrastive batch all cost the same, and equal numbers of them are cut in order. Dialogues differ by an
order of magnitude, and memory is bound by tokens and images, not by their number. So they are put into micro-batches as
things into knapsacks: by first fit decreasing for their number, then evenly, the costliest first into the emptiest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError
from vlm_train.objectives.base import Objective
from vlm_train.types import Batch, BatchRows, DialogueSpec

Rows = Sequence[int]

AUTO = "auto"
"""As `trainer.micro_batch`: the largest that fits, see `rehearsal.py`."""

_SPLITS = sorted({*(2**power for power in range(21)), *(3 * 2**power for power in range(19))})
"""Numbers of micro-batches that are tried where they are to be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What one rank runs forward at once holds at most: samples, and of dialogues tokens and images. None: no bound."""

    samples: int | None = None
    tokens: int | None = None
    images: int | None = None

    @property
    def weighs_dialogues(self) -> bool:
        """Whether how much a sample takes is known from its dialogue alone."""
        return self.tokens is not None or self.images is not None

    @classmethod
    def of(cls, trainer: Any) -> Budgets:
        """As `schema.TrainerConfig` says; without a bound while it is not known yet."""
        samples = None if trainer.micro_batch == AUTO else trainer.micro_batch
        return cls(samples=samples, tokens=trainer.micro_tokens, images=trainer.micro_images)

    def check_objective(self, objective: Objective) -> None:
        """Raises ConfigError where an objective that does not read dialogues is given their budgets."""
        if self.weighs_dialogues and "dialogue_labels" not in objective.reads:
            raise ConfigError(
                "micro-batches by tokens or images are of dialogues",
                got=f"trainer.micro_tokens={self.tokens} trainer.micro_images={self.images}, and the objective "
                f"{type(objective).__name__}",
                allowed="objective=next_token",
                remedy="trainer.micro_batch=N in their place",
            )

    def check(self, dialogue: DialogueSpec) -> None:
        """Raises ConfigError where the longest dialogue would fit into no micro-batch."""
        for name, budget, least in (
            ("micro_tokens", self.tokens, dialogue.context_length),
            ("micro_images", self.images, dialogue.num_places),
        ):
            if budget is not None and budget < least:
                raise ConfigError(
                    "a dialogue may be larger than a micro-batch",
                    got=f"trainer.{name}={budget}",
                    allowed=f"at least {least}, what one dialogue of this model may take",
                    remedy=f"trainer.{name}={least}, or null",
                )


def even_sizes(global_batch: int, num_ranks: int) -> list[int]:
    """Numbers of samples that cut the shares of all ranks evenly, descending; the first is the largest share. None
    leaves a rank with an empty micro-batch."""
    smallest, largest = global_batch // num_ranks, -(-global_batch // num_ranks)
    splits = [split for split in _SPLITS if split < smallest] + [smallest]
    return sorted({-(-largest // split) for split in splits}, reverse=True)


def pack(sizes_NB: NDArray[np.float64], num_groups: int = 0) -> list[list[int]]:
    """Rows in groups, none of which is over 1 in any budget; as many as `num_groups` or, where more are needed, as
    first fit decreasing takes, some empty where rows are fewer. The costliest group comes first.

    Args:
        sizes_NB: which share of each of B budgets a row takes, each at most 1.
        num_groups: the fewest groups.
    """
    tight = _fill(sizes_NB, 0, evenly=False)
    most = max(num_groups, len(tight))
    even = _fill(sizes_NB, most, evenly=True)
    if len(even) > most:  # evenness may strew small rows over the room of a large one
        even = tight + [[] for _ in range(most - len(tight))]
    return sorted(even, key=lambda rows: -sizes_NB[rows].sum(axis=0).max(initial=0))


def _fill(sizes_NB: NDArray[np.float64], num_groups: int, *, evenly: bool) -> list[list[int]]:
    """The largest row first, into the first group that has room, or into the emptiest that has; a new one where none
    of `num_groups` and those opened since has."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads_GB = np.zeros((num_groups + len(sizes_NB), sizes_NB.shape[1]))
    for row in np.argsort(-sizes_NB.max(axis=1), kind="stable").tolist():
        open_GB = loads_GB[: len(groups)]
        fitting = np.flatnonzero((open_GB + sizes_NB[row] <= 1 + 1e-9).all(axis=1))
        if not len(fitting):
            chosen = len(groups)
            groups.append([])
        else:
            chosen = int(fitting[open_GB[fitting].max(axis=1).argmin()] if evenly else fitting[0])
        groups[chosen].append(row)
        loads_GB[chosen] += sizes_NB[row]
    return groups


def pack_dialogues(batch: Batch, budgets: Budgets) -> list[Rows]:
    """The rows of each micro-batch of this rank, as many on every rank: a collective, and it waits for the device.

    Rows of a micro-batch ascend. One may be empty where another rank needs more micro-batches than this has rows.
    """
    taken = torch.stack([batch["dialogue_lengths"], batch["num_images"]], dim=1).cpu().numpy()
    sizes = np.concatenate([np.ones((len(taken), 1)), taken], axis=1)
    limits = [bound or np.inf for bound in (budgets.samples, budgets.tokens, budgets.images)]
    shares = sizes / np.array(limits)
    groups = pack(shares)
    most = int(collectives.all_reduce_max(torch.tensor(len(groups), device=batch["dialogue_lengths"].device)))
    return [sorted(rows) for rows in (groups if most == len(groups) else pack(shares, most))]


def take_rows(batch: Batch, rows: Rows) -> Batch:
    """These rows of every field that has rows; fields of the whole step are left out. Views where rows are a range.

    No rows are the first one, which then counts for nothing: whoever shares the weights waits for a forward pass.
    """
    chosen = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows) or [0]
    names = [name for name in BatchRows.__annotations__ if name in batch]
    taken = Batch(**{name: _chosen(batch[name], chosen) for name in names})  # type: ignore[typeddict-item, literal-required]
    if not rows and isinstance(chosen, list):
        taken["weights"] = torch.zeros_like(taken["weights"])
    return taken


def _chosen(value: Any, rows: slice | list[int]) -> Any:
    gathers = isinstance(value, list) and isinstance(rows, list)
    return [value[row] for row in rows] if gathers else value[rows]  # type: ignore[union-attr]
