"""The connector that was described for "Llama 3-V": patches look at each other before a language model reads them.

The description names a projection with two blocks of self-attention. The code that was shown for it, and withdrawn in
June 2024, was another model's: one cross-attention of learned queries. So this follows the words and has no published
weights.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlm_train.models.connectors.base import Connector, require_counts
from vlm_train.models.layers import Linear, blocks_flops, linear_flops, make_blocks, run_blocks


class SelfAttentionConnector(Connector):
    """A linear to the language model's width where the tower's is another, then pre-norm blocks over the patches of an
    image. A token for each patch.

    Args:
        in_dim: Dv, width of the patches.
        out_dim: D, width of the language model.
        num_patches: P of one image.
        num_layers: number of blocks.
        num_heads: attention heads per block, a divisor of `out_dim`.
        norm_eps: epsilon of the layer norms.

    Raises:
        ConfigError: no block, or heads that do not divide the width.
    """

    keeps_places = True

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_patches: int,
        num_layers: int = 2,
        num_heads: int = 8,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        require_counts({"num_layers": num_layers, "num_heads": num_heads})
        self.num_tokens = num_patches
        self.project = None if in_dim == out_dim else Linear(in_dim, out_dim, std=in_dim**-0.5)
        self.blocks: nn.ModuleList = make_blocks(
            num_layers, width=out_dim, num_heads=num_heads, mlp_dim=4 * out_dim, activation="gelu", norm_eps=norm_eps
        )

    def forward(self, x_NPD: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, P, D]."""
        return run_blocks(self.blocks, x_NPD if self.project is None else self.project(x_NPD), read_B=None)

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        projection = 0.0 if self.project is None else linear_flops(self.project, self.num_tokens)
        return projection + blocks_flops(self.blocks, self.num_tokens, reads_one=False)
