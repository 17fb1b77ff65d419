"""Low-rank adapters in a language model (LoRA, Hu et al. 2021, arXiv 2106.09685), put there by the library peft.

Beside a linear layer W stands the product B A of two thin ones: it gives W x + (alpha / rank) B A x, with dropout
before A. A is drawn as that of `nn.Linear` and B is zero, so that training begins with the model as it was. W does not
learn, and neither does anything else of the network.

W keeps its values under another name: `q_proj.weight` is `q_proj.base_layer.weight`, beside it stand
`q_proj.lora_A.default.weight` and `q_proj.lora_B.default.weight`. A state that holds adapters also holds alpha / rank,
as `lora_scale`, so that it can be merged by itself: `merged`.

Where W is quantised (QLoRA, `nf4.py`), `q_proj.base_layer.weight` holds it packed, and `q_proj.base_layer.absmax` what
belongs to that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError, nearest
from vlm_train.models.nf4 import NF4Linear, dequantized, quantized

SCALE = "lora_scale"
"""Name of alpha / rank in the state of a language model with adapters."""

QUANTIZE = (None, "nf4")
"""What `quantize` may be."""

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
_ABSMAX = f"{_BASE}absmax"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """What adapters a language model gets.

    `rank`: rows of A; `alpha`: the adapters' output is taken times alpha / rank; `dropout`: of what A reads; `targets`:
    last names of the linear layers inside the decoder's layers that get one, such as `q_proj`; None: all of them. The
    vocabulary never gets one. `quantize`: "nf4" keeps the weights that they stand beside in 4 bits; None as they are.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: Sequence[str] | None = None
    quantize: str | None = None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Lora:
        """From the keys of `model.text.lora`. Raises ConfigError."""
        known = [field.name for field in fields(cls)]
        for key in keys:
            if key not in known:
                raise ConfigError("model.text.lora has no such key", got=key, allowed=known,
                                  remedy=f"did you mean {', '.join(nearest(key, known)) or 'none of it'}?")  # fmt: skip
        if missing := {"rank", "alpha"} - keys.keys():
            raise ConfigError("model.text.lora says too little", got=dict(keys), allowed="rank and alpha at least",
                              remedy=f"add {' and '.join(sorted(missing))}")  # fmt: skip
        lora = cls(**keys)
        lora._check()
        return lora

    def _check(self) -> None:
        numbers: dict[str, tuple[Any, bool, str]] = {
            "rank": (self.rank, _is_number(self.rank, int) and self.rank >= 1, "a whole number, at least 1"),
            "alpha": (self.alpha, _is_number(self.alpha, int, float) and self.alpha > 0, "a number above 0"),
            "dropout": (self.dropout, _is_number(self.dropout, int, float) and 0 <= self.dropout < 1, "0 <= p < 1"),
        }
        for key, (value, is_right, allowed) in numbers.items():
            if not is_right:
                raise ConfigError(f"model.text.lora.{key} is out of range", got=value, allowed=allowed,
                                  remedy="LLaVA takes rank 128, alpha 256 and dropout 0.05")  # fmt: skip
        if self.quantize not in QUANTIZE:
            raise ConfigError("model.text.lora.quantize is no kind of quantisation", got=self.quantize,
                              allowed=list(QUANTIZE), remedy="nf4, as in QLoRA, or null")  # fmt: skip


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def inject(network: nn.Module, blocks: nn.ModuleList, lora: Lora) -> None:
    """Gives linear layers inside `blocks`, a part of `network`, adapters, in place, and freezes the rest of `network`;
    what they stand beside is quantised where `lora` says so.

    Raises:
        ConfigError: a target that no linear layer of the blocks is called.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes three seconds to import

    prefix = next(name for name, part in network.named_modules() if part is blocks)
    linears = [f"{prefix}.{name}" for name, part in blocks.named_modules() if isinstance(part, nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name in linears})
    targets = known if lora.targets is None else list(lora.targets)
    for target in targets:
        if target not in known:
            raise ConfigError("model.text.lora.targets names no linear layer of the language model", got=target,
                              allowed=known, remedy="take names from this list, or null for all of them")  # fmt: skip
    if not targets:
        raise ConfigError("model.text.lora.targets is empty", got=[], allowed=known, remedy="null takes all of them")
    chosen = [name for name in linears if name.rpartition(".")[2] in targets]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen)  # type: ignore[arg-type]
    inject_adapter_in_model(config, network)
    if lora.quantize is not None:
        for name in chosen:
            layer: Any = network.get_submodule(name)
            layer.base_layer = NF4Linear(layer.base_layer)


def plain_names(names: Iterable[str]) -> list[str]:
    """What the tensors of a state are called when its adapters are merged, in order."""
    return [_plain(name) for name in names if not _is_of_adapter(name)]


@torch.no_grad()
def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the same model without adapters: W + (alpha / rank) B A under the name of W, in the type of W,
    or of its magnitudes where it is quantised.

    A state without adapters comes back as it is. Products are formed in fp32 at least.
    """
    result = {_plain(name): tensor for name, tensor in state.items() if not _is_of_adapter(name)}
    for prefix, scale in ((name.removesuffix(SCALE), state[name]) for name in state if _is_scale(name)):
        for stem in (name.removesuffix(_A) for name in state if name.startswith(prefix) and name.endswith(_A)):
            weight, a_RD, b_DR = (state[f"{stem}{part}"] for part in (f"{_BASE}weight", _A, _B))
            if (absmax := state.get(f"{stem}{_ABSMAX}")) is not None:
                weight = dequantized(weight, absmax, a_RD.shape[1]).to(absmax.dtype)
            wide = torch.promote_types(weight.dtype, torch.float32)
            added = scale.to(wide) * (b_DR.to(wide) @ a_RD.to(wide))
            result[f"{stem}.weight"] = (weight.to(wide) + added).to(weight.dtype)
    return result


def fitted(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, of a model with or without adapters, for a model whose state is `own`, with or without them.

    Adapters go on where both have them in the same places, of the same rank and the same alpha, beside weights that
    are quantised in both or in neither. Any others are merged into the weights, which are quantised where those of
    `own` are, and the adapters of `own` keep their first values.
    """
    if _adapters(state) == _adapters(own):
        return dict(state)
    base_name = {_plain(name): name for name in own if not _is_of_adapter(name)}
    fresh = {name: tensor for name, tensor in own.items() if _is_of_adapter(name)}
    result = {base_name.get(name, name): tensor for name, tensor in merged(state).items()} | fresh
    for absmax in (name for name in own if name.endswith(_ABSMAX)):
        weight = absmax.replace(_ABSMAX, f"{_BASE}weight")
        if weight in result:
            result[weight], result[absmax] = quantized(result[weight].to(own[absmax].device))
    return result


def _adapters(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells adapters apart: places, shapes, what they stand beside, and the scale where it has a value."""
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in state.items() if _is_of_adapter(name)}
    return shapes | {name: float(state[name]) for name in state if _is_scale(name) and not state[name].is_meta}


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == SCALE


def _is_of_adapter(name: str) -> bool:
    return _is_scale(name) or name.endswith((_A, _B, _ABSMAX))


def _plain(name: str) -> str:
    return name.replace(_BASE, ".")
