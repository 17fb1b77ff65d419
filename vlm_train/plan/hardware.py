"""GPUs that a plan may be made for: what their data sheets say, and what an hour of them is taken to cost."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_train.engine.flops import GPU_PEAK_TFLOPS
from vlm_train.errors import ConfigError, nearest

USABLE = 0.92
"""Of a GPU's memory; the rest is for CUDA, NCCL, workspaces, and what lies in pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind. `peak`: dense bf16 FLOP/s, as MFU is counted (`engine.flops`); `memory`: bytes; `price`: US dollars an
    hour, an assumption about the middle of what clouds ask on demand."""

    name: str
    peak: float
    memory: float
    price: float

    @property
    def usable(self) -> float:
        """Bytes that tensors may take."""
        return USABLE * self.memory


_KINDS = {  # name: (key of GPU_PEAK_TFLOPS, memory in GB, dollars an hour)
    "h200": ("H200", 141, 3.5),
    "h100": ("H100", 80, 3.0),
    "h100-nvl": ("H100 NVL", 94, 2.8),
    "h100-pcie": ("H100 PCIe", 80, 2.4),
    "a100": ("A100", 80, 1.8),
    "a100-40gb": ("A100", 40, 1.3),
    "l40s": ("L40S", 48, 1.1),
    "l4": ("L4", 24, 0.7),
    "a10": ("A10", 24, 0.8),
    "v100": ("V100", 32, 0.9),
    "t4": ("T4", 16, 0.35),
    "rtx-4090": ("RTX 4090", 24, 0.5),
    "rtx-3090": ("RTX 3090", 24, 0.3),
}

GPUS = {
    name: Gpu(name=name, peak=GPU_PEAK_TFLOPS[key] * 1e12, memory=memory * 1e9, price=price)
    for name, (key, memory, price) in _KINDS.items()
}


def gpu_of(name: str) -> Gpu:
    """The kind of this name. Raises ConfigError."""
    if name.lower() not in GPUS:
        close = nearest(name.lower(), GPUS)
        raise ConfigError("no such GPU is known", got=f"gpu={name}", allowed=", ".join(GPUS),
                          remedy=f"gpu={(close or ['h100'])[0]}")  # fmt: skip
    return GPUS[name.lower()]
