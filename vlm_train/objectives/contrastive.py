"""What the contrastive objectives share: which rows count, the temperature, and the precision of the maths.

The temperature is kept as its logarithm in `logit_scale` of shape [1] (sharded strategies refuse 0-dim parameters) and
stays fp32, or fp64 in fp64 runs: near ln 100 the bf16 grid is 0.031 wide, so a cast moves the scale by 3 %. Logits are
formed in the same precision, with autocast off: bf16 logits cost about 1 % of the gradient at the usual scales.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError
from vlm_train.objectives.base import CoupledObjective, counted_rows
from vlm_train.objectives.pairing import NOBODY, Pairing, gathered_bytes
from vlm_train.types import MODALITIES, Batch, Model, has_modality

Partners = Literal["pair", "content"]
Implementation = Literal["auto", "gathered", "tiled"]

GATHERED_SHARE = 1 / 16
"""Of a device's memory, what the gathered losses may take before `auto` turns to tiles."""


class Contrastive(CoupledObjective):
    """Matching of images and texts over the global batch, or of any two modalities, with a temperature.

    A batch may bring hard captions, texts that are almost right (`hard_text_ids` [B, H, T], and `hard_counts`, which of
    them there are). They are further wrong answers for every image, and are not asked for an image themselves.

    Args:
        init_scale: first value of the factor on the cosine (1 / temperature).
        max_scale: the factor is clamped to [1, max_scale] after each step; None leaves it free.
        learn_temperature: whether the factor is trained.
        partners: `pair`: an image and its caption. `content`: also an image and a caption of pairs that hold the same
            image or the same caption, which are false negatives otherwise.
        implementation: how it is computed; the result is the same but for rounding. `gathered`: every feature on every
            rank, logits of [b, N]. `tiled`: texts travel round the ranks and logits exist a tile at a time, O(b d).
            `auto`: tiled where gathered would take more than `GATHERED_SHARE` of the device's memory.
        pair: the two that are matched: image, text, or names of `MODALITIES`. A sample counts where it has both. What
            is said of images here and in `Pairing` holds of the first, and what of texts of the second; hard captions
            are wrong answers only where that is `text`.
    """

    def __init__(
        self,
        *,
        init_scale: float,
        max_scale: float | None,
        learn_temperature: bool,
        partners: Partners,
        implementation: Implementation,
        pair: Sequence[str] = ("image", "text"),
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("partners", partners, Partners),
            ("implementation", implementation, Implementation),
        ):
            if value not in get_args(allowed):
                raise ConfigError(
                    f"{type(self).__name__} knows no such {name}", got=value, allowed=", ".join(get_args(allowed))
                )
        if not init_scale > 0 or (max_scale is not None and not 1 <= init_scale <= max_scale):
            raise ConfigError(
                f"{type(self).__name__}: the initial scale on the cosine is out of range",
                got=f"initial scale {init_scale:g}, max_scale {max_scale}",
                allowed="0 < scale, and 1 <= scale <= max_scale where max_scale is set",
            )
        if len(pair) != 2 or len(set(pair)) != 2 or not set(pair) <= {"image", "text", *MODALITIES}:
            raise ConfigError(
                f"{type(self).__name__} cannot match this pair", got=list(pair),
                allowed=f"two of image, text, {', '.join(MODALITIES)}", remedy="pair: [image, text]",
            )  # fmt: skip
        self.pair = (pair[0], pair[1])
        self.requires = frozenset(f"{name}_features" for name in pair)
        self.init_scale, self.max_scale = init_scale, max_scale
        self.partners, self.implementation = partners, implementation
        self.reads = frozenset({"contents"} if partners == "content" else ())
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
        """Number of pairs that count."""
        return self._counted(batch).sum()

    def _counted(self, batch: Batch) -> Tensor:
        """Rows that have both of the pair, bool [B]."""
        rows = counted_rows(batch)
        for name in self.pair:
            if name in MODALITIES:
                rows = rows & has_modality(batch, name)
        return rows

    def features(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """`image_features` and `text_features` [B, D] (of the pair's first and second), `weights` [B]; hard captions
        and contents where needed."""
        num_pairs, is_hard = len(batch["text_ids"]), "hard_text_ids" in batch and self.pair[1] == "text"
        outputs = model(_with_hard_captions(batch) if is_hard else batch)
        image_BD, text_ED = (outputs[f"{name}_features"] for name in self.pair)
        rows = {"image_features": image_BD, "text_features": text_ED[:num_pairs]}
        if is_hard:
            rows["hard_features"] = text_ED[num_pairs:].unflatten(0, batch["hard_text_ids"].shape[:2])
            rows["hard_counts"] = batch["hard_counts"]
        if self.partners == "content":
            rows["contents"] = batch["contents"]
        return {**rows, "weights": self._counted(batch).to(torch.float32)}

    def pairing(self, features: dict[str, Tensor]) -> Pairing:
        """The rows that count, at least fp32, and who belongs to whom. Collective.

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
        image_BD, text_CD = features["image_features"][keep], features["text_features"][keep]
        image_counts = text_counts = collectives.row_counts(image_BD)
        if self.partners == "content":
            ids = features["contents"][keep]
        else:
            before = sum(image_counts[: collectives.rank()])
            ids = torch.arange(before, before + len(image_BD), device=image_BD.device)[:, None]
        text_ids = ids
        if "hard_features" in features:
            hard_ED = features["hard_features"][keep][features["hard_counts"][keep]]
            text_CD = torch.cat([text_CD, hard_ED])
            text_ids = torch.cat([ids, ids.new_full((len(hard_ED), ids.shape[1]), NOBODY)])
            text_counts = collectives.row_counts(text_CD)
        dtype = torch.promote_types(torch.promote_types(image_BD.dtype, text_CD.dtype), self.logit_scale.dtype)
        return Pairing(
            image_BD=image_BD.to(dtype),
            text_CD=text_CD.to(dtype),
            image_ids=ids,
            text_ids=text_ids,
            image_counts=image_counts,
            text_counts=text_counts,
        )

    def tiles(self, pairing: Pairing) -> bool:
        """Whether the loss is computed in tiles. Equal on every rank."""
        if self.implementation == "auto":
            return gathered_bytes(pairing) > GATHERED_SHARE * device_memory(pairing.image_BD.device)
        return self.implementation == "tiled"


def _with_hard_captions(batch: Batch) -> Batch:
    """The batch with its hard captions behind its captions."""
    both = Batch(**batch)
    both["text_ids"] = torch.cat([batch["text_ids"], batch["hard_text_ids"].flatten(0, 1)])
    both["text_mask"] = torch.cat([batch["text_mask"], batch["hard_text_mask"].flatten(0, 1)])
    return both


@functools.cache
def device_memory(device: torch.device) -> float:
    """Bytes of memory that a rank has: the smallest of all ranks. Collective on its first call."""
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return -collectives.all_reduce_max(torch.tensor(-float(size), dtype=torch.float64, device=device)).item()


def one_value(x: Tensor) -> tuple[Tensor, Tensor]:
    """A [1] tensor as a metric: (sum, count) whose average over ranks is the value."""
    return x.detach().squeeze(0), torch.ones((), dtype=torch.int64, device=x.device)


def wide_empty() -> Tensor:
    """An unset [1] tensor of at least fp32, whatever the default dtype is."""
    return torch.empty(1, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
