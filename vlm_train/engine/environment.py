"""What trains on what: the size of the model, the device, and the versions, as a report names them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_train import __version__
from vlm_train.models.attention import kernels_of
from vlm_train.models.nf4 import num_weights


def environment(model: nn.Module, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Fields of the `environment` event. Numbers of parameters by part, and of those that learn."""
    parts = {name: num_weights(part) for name, part in model.named_children()}
    return {
        "num_parameters": num_weights(model),
        "num_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parts": {name: count for name, count in parts.items() if count},
        "attention": kernels_of(model),
        "device": device_name(device),
        "num_ranks": num_ranks,
        "num_cores": len(os.sched_getaffinity(0)),
        "versions": {
            "vlm-train": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning", "transformers")},
        },
    }


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
