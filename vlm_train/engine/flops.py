"""Model FLOP utilisation: useful arithmetic done, as a share of what the machine could do.

Useful means forward plus backward of one pass over each sample, without recomputation, padding or embedding look-ups.
A product of a weight and activations has a gradient of each, and each costs what the product costs:

- a part that learns costs three times its forward, that of its first layer towards the pixels included, though nobody
  asks for it: that is small, and so the figure is comparable with what is published;
- a frozen part that reads what a learning part made (a language model above a connector that learns) passes gradients
  on, without those of its weights: twice the products with its weights, three times the products of activations
  with each other that attention is made of;
- weights that adapters have taken the place of (LoRA) likewise, the adapters three times;
- a frozen part with nothing below it that learns costs its forward only.

The peak of a GPU is its data sheet's dense figure; the peak of a CPU is measured, as the best of a few large matrix
products with the threads this rank has.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vlm_train.types import Batch

# Dense bf16/fp16 tensor-core TFLOP/s of the vendor's data sheets; the first name contained in the device's name counts.
GPU_PEAK_TFLOPS = {
    "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "A10": 125.0,
    "L40S": 362.0, "L4": 121.0, "V100": 125.0, "T4": 65.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip


def training_flops_per_sample(model: Any, num_text_tokens: int, num_images: float | None = None) -> float:
    """FLOPs of forward and backward of one sample. `num_images`: of a dialogue, the mean; None where a sample has the
    one that the model counts."""
    return sum(training_flops_by_part(model, num_text_tokens, num_images).values())


def training_flops_by_part(model: Any, num_text_tokens: int, num_images: float | None = None) -> dict[str, float]:
    """As `training_flops_per_sample`, of each part that `forward_flops` tells of."""
    counts = (num_text_tokens,) if num_images is None else (num_text_tokens, num_images)
    parts: dict[str, float] = {}
    for part, forward in model.forward_flops(*counts).items():
        module = _module(model, part)
        if runs_backward(model, part):
            parts[part] = 3 * forward - _frozen_products(module, forward, num_text_tokens)
        else:
            parts[part] = forward
    return parts


def runs_backward(model: Any, part: str) -> bool:
    """Whether gradients come through a part: it learns, or something that it reads does."""
    return _learns(_module(model, part)) or _passes_gradients(model, part)


def shapes_of(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, where its FLOPs are counted without values, memory or other ranks."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        shape = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape
    return copy.deepcopy(model, memo)


def _frozen_products(module: Any, forward: float, num_text_tokens: int) -> float:
    """What of a part's forward FLOPs is products with weights that do not learn."""
    if hasattr(module, "frozen_flops"):
        return float(module.frozen_flops(num_text_tokens))
    return 0.0 if _learns(module) else forward


def _passes_gradients(model: Any, part: str) -> bool:
    """Whether anything learns among the parts whose results `part` reads."""
    inputs: Mapping[str, Sequence[str]] = getattr(model, "part_inputs", {})
    return any(_learns(_module(model, name)) or _passes_gradients(model, name) for name in inputs.get(part, ()))


def _module(model: Any, part: str) -> Any:
    return functools.reduce(lambda module, name: getattr(module, name, None), part.split("."), model)


def _learns(module: Any) -> bool:
    return not isinstance(module, nn.Module) or any(p.requires_grad for p in module.parameters())


def num_tokens(batch: Batch) -> int:
    """Text tokens of a sample of the batch: of dialogues, which are not padded where they are packed, the mean."""
    if "dialogue_lengths" in batch:
        return round(float(batch["dialogue_lengths"].double().mean()))
    return batch["text_ids"].shape[1]


def num_images(batch: Batch) -> float | None:
    """Images of a dialogue of the batch, the mean; None where samples are no dialogues."""
    return float(batch["num_images"].double().mean()) if "num_images" in batch else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that one rank can reach at best; None for a GPU that the table does not know."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for key, peak in GPU_PEAK_TFLOPS.items() if key in name), None)
    return _measured_peak(dtype)


def _measured_peak(dtype: torch.dtype, side: int = 1024, num_runs: int = 12) -> float:
    left, right = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    seconds = []
    for _ in range(num_runs):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
