"""StableAdamW (Wortsman et al., arXiv 2304.13013): AdamW with smaller steps where its second moment is too small.

RMS_t = sqrt(mean(g^2 / max(v, eps^2))) over a tensor, v the second moment without bias and g^2 already in it, tells how
far the gradient has outgrown what AdamW expects. The whole update of a tensor, its decay included, is divided by
max(1, RMS_t). It takes the place of clipping the gradient: loss spikes come one to eight steps after RMS_t grows.

The update is AdamW's own fused one, of which a part is then taken back. The RMS is that of the whole tensor: what ranks
hold of a sharded one is added up, in one exchange for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlm_train.distributed import collectives
from vlm_train.engine import sharding


class StableAdamW(torch.optim.AdamW):
    """torch's AdamW with update clipping; the state is AdamW's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. Collective where parameters are sharded."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        learning = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not learning:
            return result
        weights = sharding.local(learning)
        before = [weight.clone() for weight in weights]
        super().step()
        excess = 1 - 1 / self._rms(learning).clamp(min=1)
        # not a number where fp16's scaler left the step out, or where nothing can be saved
        excess = excess.nan_to_num(nan=0.0).to(weights[0].dtype)
        torch._foreach_lerp_(weights, before, list(excess.unbind()))
        return result

    def _rms(self, learning: list[Tensor]) -> Tensor:
        """RMS_t of each parameter, fp64 [n]."""
        beta2, eps = self.defaults["betas"][1], self.defaults["eps"]
        states = [self.state[parameter] for parameter in learning]
        bias = 1 - beta2 ** torch.stack([state["step"] for state in states]).double()
        gradients = sharding.local([p.grad for p in learning if p.grad is not None])
        ratios = list(torch._foreach_div(sharding.local([s["exp_avg_sq"] for s in states]), list(bias.unbind())))
        torch._foreach_clamp_min_(ratios, max(eps**2, torch.finfo(ratios[0].dtype).tiny))  # its inverse is a number
        torch._foreach_reciprocal_(ratios)
        torch._foreach_mul_(ratios, gradients)
        pairs = zip(gradients, ratios, strict=True)
        squares = torch.stack([torch.dot(g.flatten(), ratio.flatten()) for g, ratio in pairs]).double()
        sharded = torch.tensor([isinstance(parameter, DTensor) for parameter in learning])
        if sharded.any():
            sharded = sharded.to(squares.device)
            squares = torch.where(sharded, collectives.all_reduce_sum(squares), squares)
        sizes = torch.tensor([parameter.numel() for parameter in learning], device=squares.device)
        return (squares / sizes).sqrt()
