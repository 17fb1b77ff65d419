"""A tower that reads what stands in a picture instead of its pixels: a token for each region of KEY.json.

A token is the sum of the embeddings of the region's names and of a projection of its box; nothing tells one token from
another but these, so the order of regions does not count. Both start at one scale, so that neither drowns the other. A
class token reads them all. It is what detectors' regions were to ViLBERT and LXMERT (arXiv 1908.02265, 1908.07490),
with the names in place of a detector's features, and shows what an objective can teach where seeing is no obstacle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.models.layers import (
    Activation,
    Embedding,
    Linear,
    blocks_flops,
    first_of,
    linear_flops,
    make_blocks,
    prepend,
    run_blocks,
)
from vlm_train.models.vision.image import as_image_spec
from vlm_train.types import NUM_REGION_BUCKETS, NUM_REGION_NAMES, ImageSpec, ModalitySpec

_PER_SIDE = 1000.0


class RegionTransformer(nn.Module):
    """Regions int64 [B, N, 4 + names], as `data/modalities/regions.py` makes them -> one vector per picture [B, D].

    Args:
        image: the square that boxes refer to; its `size` also says how large pictures are drawn for reports.
        num_regions: N, the most regions of one picture.
        width: D, also `out_dim`.
        num_layers: number of blocks.
        num_heads: attention heads per block, a divisor of `width`.
        mlp_dim: hidden width of the MLPs; 4 * width unless given.
        activation: see `layers.make_activation`.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        *,
        image: ImageSpec | Mapping[str, Any],
        num_regions: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int | None = None,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.image_spec = as_image_spec(image)
        self.reads = ModalitySpec(name="regions", shape=(num_regions, 4 + NUM_REGION_NAMES))
        self.num_regions, self.out_dim = num_regions, width
        self.names = Embedding(NUM_REGION_BUCKETS, width, std=0.5)
        self.box = Linear(4, width, std=1.0)
        self.class_token = nn.Parameter(torch.empty(width))
        mlp_dim = 4 * width if mlp_dim is None else mlp_dim
        self.blocks = make_blocks(
            num_layers, width=width, num_heads=num_heads, mlp_dim=mlp_dim, activation=activation, norm_eps=norm_eps
        )
        self.post_norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The class token starts normal(0, 1/sqrt(D))."""
        nn.init.normal_(self.class_token, std=self.out_dim**-0.5)

    def forward(self, regions_BNF: Tensor) -> Tensor:
        """int64 [B, N, F] -> [B, D], not L2-normalised."""
        boxes_BN4, names_BNL = regions_BNF[..., :4], regions_BNF[..., 4:]
        named_BNLD = self.names(names_BNL) * (names_BNL > 0)[..., None]
        dtype = named_BNLD.dtype
        x_BND = named_BNLD.sum(2) + self.box((boxes_BN4 / (_PER_SIDE / 2) - 1).to(self.box.weight.dtype)).to(dtype)
        x_BTD = prepend(self.class_token, x_BND)
        there_BT = F.pad(names_BNL[..., 0] > 0, (1, 0), value=True)
        x_B1D = run_blocks(self.blocks, x_BTD, mask=there_BT[:, None, None, :], read_B=first_of(x_BTD))
        return self.post_norm(x_B1D).squeeze(1)

    def forward_flops(self) -> float:
        """Forward FLOPs of one picture with as many regions as there may be."""
        return linear_flops(self.box, self.num_regions) + blocks_flops(
            self.blocks, self.num_regions + 1, reads_one=True
        )
