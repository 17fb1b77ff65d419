"""What the contrastive objectives share: which rows count, the temperature, and the precision of the maths.

The temperature is kept as its logarithm in `logit_scale` of shape [1] (sharded strategies refuse 0-dim parameters) and
stays fp32, or fp64 in fp64 runs: near ln 100 the bf16 grid is 0.031 wide, so a cast moves the scale by 3 %. Logits are
formed in the same precision, with autocast off: bf16 logits cost about 1 % of the gradient at the usual scales.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError
from vlm_train.objectives.base import CoupledObjective, counted_rows
from vlm_train.types import Batch, Model


class Contrastive(CoupledObjective):
    """Image-text matching over the global batch, with a temperature.

    Args:
        init_scale: first value of the factor on the cosine (1 / temperature).
        max_scale: the factor is clamped to [1, max_scale] after each step; None leaves it free.
        learn_temperature: whether the factor is trained.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"image_features", "text_features"})

    def __init__(self, *, init_scale: float, max_scale: float | None, learn_temperature: bool) -> None:
        super().__init__()
        if not init_scale > 0 or (max_scale is not None and not 1 <= init_scale <= max_scale):
            raise ConfigError(
                f"{type(self).__name__}: the initial scale on the cosine is out of range",
                got=f"initial scale {init_scale:g}, max_scale {max_scale}",
                allowed="0 < scale, and 1 <= scale <= max_scale where max_scale is set",
            )
        self.init_scale, self.max_scale = init_scale, max_scale
        self.logit_scale = nn.Parameter(wide_empty(), requires_grad=learn_temperature)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the parameters to their first values (also after a build on the meta device)."""
        self.logit_scale.fill_(math.log(self.init_scale))

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamps the temperature."""
        if self.max_scale is not None:
            self.logit_scale.clamp_(0.0, math.log(self.max_scale))

    def count(self, batch: Batch) -> Tensor:
        """Number of image-text pairs that count."""
        return counted_rows(batch).sum()

    def features(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """`image_features` and `text_features` [B, D], and `weights` [B]."""
        outputs = model(batch)
        rows = {key: outputs[key] for key in sorted(self.requires)}
        return {**rows, "weights": counted_rows(batch).to(torch.float32)}

    def pairs(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Image and text features of the rows that count, [n, D] each, at least fp32.

        Dropping padding rows here, before any exchange, is what keeps them out of rows and columns alike.

        Raises:
            ConfigError: when something has cast the temperature below fp32.
        """
        if torch.finfo(self.logit_scale.dtype).bits < 32:
            raise ConfigError(
                f"{type(self).__name__}: the temperature was cast down",
                got=self.logit_scale.dtype,
                allowed="float32, float64",
                remedy="keep the objective out of the cast: convert the model, not the objective",
            )
        keep = features["weights"] != 0
        image_BD, text_BD = features["image_features"][keep], features["text_features"][keep]
        dtype = torch.promote_types(torch.promote_types(image_BD.dtype, text_BD.dtype), self.logit_scale.dtype)
        return image_BD.to(dtype), text_BD.to(dtype)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def partner_columns(counts: list[int], device: torch.device) -> Tensor:
    """Column of each local row's partner among the gathered rows of all ranks, int64 [B]. `counts`: rows per rank."""
    rank = collectives.rank()
    return torch.arange(counts[rank], device=device) + sum(counts[:rank])


def one_value(x: Tensor) -> tuple[Tensor, Tensor]:
    """A [1] tensor as a metric: (sum, count) whose average over ranks is the value."""
    return x.detach().squeeze(0), torch.ones((), dtype=torch.int64, device=x.device)


def wide_empty() -> Tensor:
    """An unset [1] tensor of at least fp32, whatever the default dtype is."""
    return torch.empty(1, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
