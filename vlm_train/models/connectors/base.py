"""What stands between an image tower and a language model, and the one contract of all that do.

A config names the class and its own options, under `_partial_: true`; the model adds what it knows of its parts:
`connector(in_dim=Dv, out_dim=D, num_patches=P)`. P counts what the connector is given of an image: its patches in rows
from the top left, and a class token where the model leaves it in. How many tokens of the language model an image
becomes is known before any image is seen: `num_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from vlm_train.errors import ConfigError


class Connector(nn.Module):
    """Base of the connectors: `forward` maps patches [N, P, Dv] of N images, 0 among them, to [N, num_tokens, D]."""

    num_tokens: int  # of the language model for one image
    keeps_places: ClassVar[bool] = False  # whether they stand as their patches do, in rows from the top left

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        raise NotImplementedError


def require_counts(counts: Mapping[str, int]) -> None:
    """Refuses a connector without layers, heads or queries; `counts`: option -> number. Raises ConfigError."""
    missing = {name: count for name, count in counts.items() if count < 1}
    if missing:
        name = next(iter(missing))
        raise ConfigError(
            "a connector needs at least one of each of its parts",
            got=", ".join(f"{name}={count}" for name, count in missing.items()),
            allowed="1 or more",
            remedy=f"set model.connector.{name}=1 or leave it out",
        )
