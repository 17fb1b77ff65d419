"""StableAdamW against the formulas of its paper, whole and in shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.optim import AdamW, StableAdamW
from vlm_train.errors import ConfigError

BETAS, NUM_STEPS = (0.9, 0.99), 8
GROUPS = [{"pattern": r".*two.*", "lr": 0.003, "weight_decay": 0.3}, {"pattern": ".*", "lr": 0.01, "weight_decay": 0.1}]


class Module(nn.Module):
    """Shapes that two ranks share unequally, one of which leaves a rank without a share."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"one": (5, 3), "two": (1, 4), "three": (7,), "four": (2, 3, 2)}.items():
            value = torch.randn(shape, dtype=torch.float64, generator=generator)
            self.register_parameter(name, nn.Parameter(value))


def gradient(name: str, step: int) -> Tensor:
    """Small for some steps, then large: what the second moment does not expect. One part of it alone is large."""
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    value = torch.randn(Module().get_parameter(name).shape, dtype=torch.float64, generator=generator)
    value[0] *= 30.0 if step == 5 else 0.1
    return value


def reference(lr: float, weight_decay: float, eps: float, name: str) -> tuple[Tensor, list[float]]:
    """Algorithm 2 of arXiv 2304.13013, written out: (the parameter after all steps, RMS of each step)."""
    beta1, beta2 = BETAS
    theta = Module().get_parameter(name).detach().clone()
    v, u, found = torch.zeros_like(theta), torch.zeros_like(theta), []
    for t in range(1, NUM_STEPS + 1):
        g = gradient(name, t)
        hat1 = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
        hat2 = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        v = hat1 * v + (1 - hat1) * g
        u = hat2 * u + (1 - hat2) * g**2
        rms = (g**2 / torch.maximum(u, torch.tensor(eps**2, dtype=u.dtype))).mean().sqrt().item()
        eta = lr / max(1.0, rms)
        theta = theta - eta * weight_decay * theta - eta * v / (u.sqrt() + eps)
        found.append(rms)
    return theta, found


def stepped(kind: type[AdamW], module: nn.Module, eps: float) -> dict[str, Tensor]:
    optimizer = kind(lr=0.01, betas=BETAS, eps=eps, groups=GROUPS).build(module)
    for step in range(1, NUM_STEPS + 1):
        for name, parameter in module.named_parameters():
            grad = gradient(name.removeprefix("model."), step)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = grad
        optimizer.step()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


@settings(max_examples=20, deadline=None)
@given(eps=st.sampled_from([1e-12, 1e-6, 1e-2, 1.0]))
def test_it_is_the_algorithm_of_the_paper(eps: float) -> None:
    stable, plain = (stepped(kind, Module(), eps) for kind in (StableAdamW, AdamW))
    for name, value in stable.items():
        rule = GROUPS[0] if "two" in name else GROUPS[1]
        expected, rms = reference(rule["lr"], rule["weight_decay"] if value.ndim > 1 else 0.0, eps, name)
        assert (value - expected).abs().max() < 1e-13  # measured 4e-16
        if eps < 1.0:
            assert max(rms) > 1.3  # the clipping has something to do ...
            assert (plain[name] - expected).abs().max() > 1e-4  # ... and AdamW, the twin, does not do it: measured 1e-3


def test_where_nothing_is_clipped_it_is_adamw_to_the_bit() -> None:
    """With eps 100, far above every gradient, no RMS comes to 1."""
    stable, plain = (stepped(kind, Module(), 100.0) for kind in (StableAdamW, AdamW))
    assert all(torch.equal(stable[name], plain[name]) for name in plain)


def sharded_and_wrong() -> list[dict[str, Tensor]]:
    """All steps on the shards of this rank; then with the RMS of each shard by itself, the deliberate mistake."""
    mesh = init_device_mesh("cpu", (collectives.world_size(),))
    found = []
    for exchange in (collectives.all_reduce_sum, lambda x: x):
        collectives.all_reduce_sum = exchange
        module = Module()
        module.model = Module()
        fully_shard(module.model, mesh=mesh)  # what stays outside is whole on every rank, as an objective is
        found.append(stepped(StableAdamW, module, 1e-6))
    return found


def test_the_rms_of_a_sharded_tensor_is_that_of_the_whole() -> None:
    whole = stepped(StableAdamW, Module(), 1e-6)
    for right, wrong in run_ranks(sharded_and_wrong, 2):
        for name, value in right.items():
            assert (value - whole[name.removeprefix("model.")]).abs().max() < 1e-13, name  # measured 0
        assert torch.equal(wrong["one"], whole["one"])  # whole on every rank
        assert (wrong["model.one"] - whole["one"]).abs().max() > 1e-3  # measured 4e-3


def test_a_step_that_the_scaler_leaves_out_changes_nothing() -> None:
    """As torch.amp's scaler tells a fused optimizer: gradients overflowed, at the first step or later."""
    module = Module()
    optimizer: Any = StableAdamW(lr=0.01, groups=GROUPS).build(module)
    for step, found in enumerate([1.0, 0.0, 1.0]):
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.grad = gradient(name, step) if found == 0 else torch.full_like(parameter, float("inf"))
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found)
        optimizer.step()
        same = [torch.equal(before[name], p) for name, p in module.named_parameters()]
        assert all(same) if found else not any(same)


def test_senseless_decays_are_refused() -> None:
    for layer_decay in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="layer_decay"):
            AdamW(lr=1e-3, layer_decay=layer_decay, groups=GROUPS)
