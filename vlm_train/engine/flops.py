"""Model FLOP utilisation: useful arithmetic done, as a share of what the machine could do.

Useful means forward plus backward (twice the forward) of one pass over each sample, without recomputation, padding or
embedding look-ups; a frozen part counts its forward only. The peak of a GPU is its data sheet's dense figure; the
peak of a CPU is measured, as the best of a few large matrix products with the threads this rank has.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import nn

from vlm_train.types import Batch

# Dense bf16/fp16 tensor-core TFLOP/s of the vendor's data sheets; the first name contained in the device's name counts.
GPU_PEAK_TFLOPS = {
    "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "A10": 125.0,
    "L40S": 362.0, "L4": 121.0, "V100": 125.0, "T4": 65.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip


def training_flops_per_sample(model: Any, num_text_tokens: int) -> float:
    """FLOPs of forward and backward of one sample; parts whose parameters are all frozen have no backward."""
    total = 0.0
    for part, forward in model.forward_flops(num_text_tokens).items():
        module = functools.reduce(lambda module, name: getattr(module, name, None), part.split("."), model)
        frozen = isinstance(module, nn.Module) and not any(p.requires_grad for p in module.parameters())
        total += forward * (1 if frozen else 3)
    return total


def num_tokens(batch: Batch) -> int:
    """Text tokens of a sample of the batch: of dialogues, which are not padded where they are packed, the mean."""
    if "dialogue_lengths" in batch:
        return round(float(batch["dialogue_lengths"].double().mean()))
    return batch["text_ids"].shape[1]


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
