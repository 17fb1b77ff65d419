"""A model that only rank 0 built: every rank gets its slices of those values."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding


class Tower(nn.Module):
    """Blocks of uneven sizes, a parameter of one value, and a buffer that is in no state."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 3, bias=False)
        self.gain = nn.Parameter(torch.full((1,), 0.3))
        self.register_buffer("shift", torch.arange(5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + self.shift).tanh()
        return self.head(x) * self.gain


def built(with_values: bool) -> Tower:
    torch.manual_seed(4)
    with torch.device("cpu" if with_values else "meta"):
        return Tower()


def on_a_rank() -> dict[str, object]:
    mesh = init_device_mesh("cpu", (collectives.world_size(),))
    found: dict[str, object] = {}
    for kind in ("right", "wrong"):
        model = built(sharding.is_built_by(collectives.rank(), "fsdp2"))
        was_meta = all(parameter.is_meta for parameter in model.parameters())
        nothing = mock.patch.object(sharding, "set_model_state_dict", lambda *args, **kwargs: None)
        if kind == "wrong":  # the twin: slices that nobody filled; zeros in place of whatever lay in the memory
            with nothing:
                sharding.shard(model, mesh)
                for parameter in model.parameters() if was_meta else ():
                    parameter.data.zero_()
        else:
            sharding.shard(model, mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        output = model(torch.ones(2, 5)).detach()
        found[kind] = {"meta": was_meta, "held": held, "output": output}
    return found


def test_every_rank_gets_the_values_that_rank_0_built() -> None:
    expected = built(True)(torch.ones(2, 5)).detach()
    whole = sum(parameter.numel() for parameter in built(True).parameters())
    ranks = run_ranks(on_a_rank, 3)
    assert [found["right"]["meta"] for found in ranks] == [False, True, True]
    for found in ranks:
        assert torch.equal(found["right"]["output"], expected)
        assert not torch.equal(found["wrong"]["output"], expected)
    assert sum(found["right"]["held"] for found in ranks) == whole


def test_without_sharding_every_rank_builds_its_own() -> None:
    assert [sharding.is_built_by(rank, strategy) for rank, strategy in ((0, "fsdp2"), (1, "fsdp2"), (1, "ddp"))] == [
        True,
        False,
        True,
    ]
