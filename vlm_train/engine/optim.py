"""Which parameter learns how fast: one ordered list decides, and nothing escapes it.

1. Every parameter takes the first group whose pattern matches its whole name.
2. A pattern that matches nothing, or a parameter that nothing matches, is an error: both are always a mistake.
3. Parameters of at most one dimension (biases, norms, temperatures) are never decayed (contrastive recipes since CLIP).
4. A group gives the peak rate; `layer_decay`, where it is set, multiplies it by the depth (`layer_decay.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vlm_train.engine.layer_decay import layer_factors
from vlm_train.engine.stable_adamw import StableAdamW as StableAdamWSteps
from vlm_train.errors import CheckpointError, ConfigError, nearest
from vlm_train.log import get_logger

LOG = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRule:
    """One entry of `optim.groups`."""

    pattern: str
    lr: float = 0.0
    weight_decay: float = 0.0
    frozen: bool = False


def match_rules(names: Iterable[str], rules: Sequence[ParameterRule]) -> dict[str, ParameterRule]:
    """name -> the first rule that matches it. Raises ConfigError for an idle rule or an unmatched name."""
    names = list(names)
    compiled = [re.compile(rule.pattern) for rule in rules]
    chosen: dict[str, ParameterRule] = {}
    for name in names:
        for rule, pattern in zip(rules, compiled, strict=True):
            if pattern.fullmatch(name):
                chosen[name] = rule
                break
        else:
            raise ConfigError(
                f"no entry of optim.groups matches the parameter {name}",
                got=[rule.pattern for rule in rules],
                allowed="patterns that together match every parameter's whole name",
                remedy='end the list with {pattern: ".*", lr: "${optim.lr}", weight_decay: "${optim.weight_decay}"}',
            )
    for rule, pattern in zip(rules, compiled, strict=True):
        if not any(pattern.fullmatch(name) for name in names):
            close = nearest(rule.pattern, names)
            raise ConfigError(
                "an entry of optim.groups matches no parameter",
                got=rule.pattern,
                allowed=f"a pattern for whole names such as {', '.join(close or names[:3])}",
            )
    return chosen


class AdamW:
    """AdamW (Loshchilov and Hutter) over the groups of one ordered list.

    Args:
        lr: peak learning rate that the default group refers to.
        betas, eps, weight_decay: as in the paper.
        grad_clip: largest norm of the whole gradient; None leaves it alone.
        ema_decay: decay per step of an exponential moving average of the weights, used for evaluation; None keeps none.
        layer_decay: factor from each layer of a tower to the one below it (BEiT fine-tunes at 0.65 to 0.85); None: 1.
        groups: dicts of ParameterRule.
    """

    steps: ClassVar[type[torch.optim.AdamW]] = torch.optim.AdamW

    def __init__(
        self,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        grad_clip: float | None = None,
        ema_decay: float | None = None,
        layer_decay: float | None = None,
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        if lr <= 0:
            raise ConfigError("optim.lr must be positive", got=lr, allowed="> 0")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ConfigError("optim.ema_decay is no decay", got=ema_decay, allowed="0 < decay < 1, or null")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ConfigError("optim.layer_decay is no decay", got=layer_decay, allowed="0 < decay <= 1, or null")
        self.lr, self.betas, self.eps, self.weight_decay = lr, (float(betas[0]), float(betas[1])), eps, weight_decay
        self.grad_clip, self.ema_decay, self.layer_decay = grad_clip, ema_decay, layer_decay
        self.rules = [ParameterRule(**group) for group in groups]

    def apply_frozen(self, module: nn.Module) -> None:
        """Freezes what the rules freeze, beside what learns nothing anyway, such as the weights that adapters stand
        beside; before any wrapper looks at it.

        Raises:
            ConfigError: a rule gives a rate to parameters of which none learns.
        """
        named = dict(module.named_parameters())
        chosen = match_rules(named, self.rules)
        for name, rule in chosen.items():
            if rule.frozen:
                named[name].requires_grad_(False)
        for rule in self.rules:
            names = [name for name in named if chosen[name] is rule]
            if names and not rule.frozen and not any(named[name].requires_grad for name in names):
                raise ConfigError(
                    "an entry of optim.groups gives a rate to parameters that cannot learn", got=rule.pattern,
                    allowed=f"frozen: true for {names[0]}; with model.text.lora only adapters learn in model.text",
                    remedy="take the entry out, or model.text.lora=null",
                )  # fmt: skip

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the parameters that learn; each group keeps its peak as `base_lr`."""
        named = dict(module.named_parameters())
        rules = match_rules(named, self.rules)
        chosen = {name: rule for name, rule in rules.items() if not rule.frozen and named[name].requires_grad}
        if not chosen:
            raise ConfigError("optim.groups freezes every parameter", got=[rule.pattern for rule in self.rules],
                              allowed="at least one that learns", remedy="optim=adamw")  # fmt: skip
        factors = self._factors(module, chosen)
        buckets: dict[tuple[float, float, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, rule in chosen.items():
            decay = rule.weight_decay if named[name].ndim > 1 else 0.0
            sharded = isinstance(named[name], DTensor)  # torch's fused step takes no mixture
            buckets.setdefault((rule.lr * factors.get(name, 1.0), decay, sharded), []).append((name, named[name]))
        groups = [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay, _), parameters in buckets.items()
        ]
        rates = [lr for lr, _, _ in buckets]
        LOG.info("%d groups of parameters, peak rates %.3g to %.3g", len(groups), min(rates), max(rates))
        optimizer = self.steps(groups, betas=self.betas, eps=self.eps, fused=True)
        optimizer.register_load_state_dict_pre_hook(_as_grouped_here)
        return optimizer

    def _factors(self, module: nn.Module, learning: Iterable[str]) -> dict[str, float]:
        """name -> what the depth leaves of a parameter's peak rate; 1 where the name is not there."""
        if self.layer_decay is None:
            return {}
        inside = {name.removeprefix("model.") for name in learning if name.startswith("model.")}
        factors = layer_factors(module.get_submodule("model"), self.layer_decay, inside)
        return {f"model.{name}": factor for name, factor in factors.items()}


class StableAdamW(AdamW):
    """AdamW whose steps are clipped by tensor instead of the gradient (`stable_adamw.py`)."""

    steps = StableAdamWSteps


def state_by_name(state: dict[str, Any]) -> dict[str, Any]:
    """name -> what an optimizer's `state_dict` holds of the parameter; a state that stands under names stays."""
    names = {
        number: name
        for group in state.get("param_groups", ())
        for number, name in zip(group["params"], group.get("param_names", group["params"]), strict=True)
    }
    return {names.get(key, key): value for key, value in state["state"].items()}


def _as_grouped_here(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state that may have been grouped otherwise, as a sharded strategy does, in the groups of `optimizer`."""
    groups = optimizer.state_dict()["param_groups"]
    saved = state_by_name(state)
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in groups)
    own = {number: saved[name] for part in pairs for number, name in part if name in saved}
    if len(own) != len(saved):
        raise CheckpointError(
            "the optimizer's state does not belong to these parameters", got=f"{len(saved)} states",
            allowed=f"{len(own)}", remedy="resume with the config of the run",
        )  # fmt: skip
    return {"state": own, "param_groups": groups}
