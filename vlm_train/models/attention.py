"""Scaled dot-product attention, and which kernel computes it.

The numbers are the same but for rounding, so the choice is the machine's:

1. `sdpa`: torch picks among its own kernels.
2. `flash`: torch's flash kernel (arXiv 2205.14135) and no other.
3. `xformers`: the memory-efficient attention of that package, on a GPU.
4. `eager`: two products and a softmax, with the whole table of weights in memory; what the others are held against.

`flash` and `xformers` take no mask of their own. What has one (padded texts, and the one position that a causal tower
reads in its last block) is computed by `sdpa`, and `told` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm_train.errors import ConfigError

Backend = Literal["sdpa", "flash", "xformers", "eager"]


class Attend(Protocol):
    """[B, H, Q, C], [B, H, T, C] twice -> [B, H, Q, C], C numbers a head.

    `mask` is bool and broadcasts to [B, H, Q, T], True where a key is read; every query reads one. `causal`, without a
    mask and with Q = T, hides the future.
    """

    def __call__(self, q_BHQC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of every head."""


def sdpa(q_BHQC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """On CPU the flash kernel is picked, which reads the strided views of a packed projection faster than copies."""
    return F.scaled_dot_product_attention(q_BHQC, k_BHTC, v_BHTC, attn_mask=mask, is_causal=causal)


def flash(q_BHQC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Without a mask torch's flash kernel or an error."""
    if mask is not None:
        return sdpa(q_BHQC, k_BHTC, v_BHTC, mask=mask, causal=causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q_BHQC, k_BHTC, v_BHTC, mask=None, causal=causal)


@torch.compiler.disable  # a library of compiled operators: a compiled block calls it as it is
def xformers(q_BHQC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Without a mask the kernel that the package picks, whose heads stand behind the tokens."""
    if mask is not None:
        return sdpa(q_BHQC, k_BHTC, v_BHTC, mask=mask, causal=causal)
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    heads = (x.transpose(1, 2) for x in (q_BHQC, k_BHTC, v_BHTC))
    return memory_efficient_attention(*heads, attn_bias=LowerTriangularMask() if causal else None).transpose(1, 2)


def eager(q_BHQC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """The softmax in fp32 or better."""
    scores = (q_BHQC * q_BHQC.shape[-1] ** -0.5) @ k_BHTC.transpose(-2, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(v_BHTC.dtype) @ v_BHTC


KERNELS: dict[Backend, Attend] = {"sdpa": sdpa, "flash": flash, "xformers": xformers, "eager": eager}


def told(attend: Attend) -> str:
    """What computes attention where `attend` was chosen."""
    name = next(name for name, kernel in KERNELS.items() if kernel is attend)
    return f"{name}; sdpa where masked" if attend in (flash, xformers) else name


def require(name: Backend) -> None:
    """Refuses what is not installed, without waking a GPU. Raises ConfigError."""
    if name == "xformers" and find_spec("xformers") is None:
        raise ConfigError("the package xformers is not installed", got="attention=xformers",
                          allowed="sdpa, flash, eager", remedy="pip install xformers, or attention=sdpa")  # fmt: skip


@functools.cache
def attempt(name: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Runs the kernel forward and backward on a few numbers.

    Raises:
        ConfigError: it is not there for this device, precision or size of a head.
    """
    require(name)
    x_BHTC = torch.zeros(1, 2, 8, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        KERNELS[name](x_BHTC, x_BHTC, x_BHTC, mask=None, causal=True).sum().backward()
    except (RuntimeError, ImportError) as error:
        raise ConfigError(
            f"attention={name} cannot run here: {str(error).splitlines()[0]}",
            got=f"{device}, {str(dtype).removeprefix('torch.')}, {head_dim} numbers a head",
            allowed="a device, precision and size of a head that torch or xformers has such a kernel for",
            remedy="precision=bf16 on a GPU; attention=sdpa anywhere",
        ) from error


def choose_attention(model: nn.Module, name: Backend, device: torch.device) -> None:
    """Every attention of ours in `model` is computed by the kernel `name` from now on, in the precision of the caller.

    Raises:
        ConfigError: the kernel cannot run on `device`.
    """
    is_cast = torch.is_autocast_enabled(device.type)
    for attention in _attentions(model):
        dtype = torch.get_autocast_dtype(device.type) if is_cast else next(attention.parameters()).dtype
        attempt(name, device, dtype, attention.head_dim)
        attention.attend = KERNELS[name]


def kernels_of(model: nn.Module) -> dict[str, str]:
    """Part of the model -> what computes its attention; parts whose attention is not ours are left out."""
    found = {}
    for part, tower in model.named_children():
        kernels = {attention.attend for attention in _attentions(tower)}
        if kernels:
            found[part] = ", ".join(sorted(told(kernel) for kernel in kernels))
    return found


def _attentions(model: nn.Module) -> Iterator[Any]:
    """The modules that let `attend` compute their attention."""
    return (module for module in model.modules() if hasattr(module, "attend"))
