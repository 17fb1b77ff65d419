"""Lightning's strategies where ours differ: a checkpoint of one is a checkpoint of every other.

A strategy that holds everything on each rank writes one file; a sharded one a folder with a file of each rank. Both
name parameters and their optimizer state by the parameter's name, so either can be read into any number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm_train.engine import states
from vlm_train.engine.optim import state_by_name


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks. Reads the files of other strategies too."""

    def __init__(self, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills the shards; returns the rest."""
        if Path(checkpoint_path).is_dir():
            return super().load_checkpoint(checkpoint_path, weights_only)
        whole: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        assert self.model is not None
        set_model_state_dict(self.model, whole.pop("state_dict"), options=StateDictOptions(full_state_dict=True))
        parameters = dict(self.model.named_parameters())
        for optimizer, state in zip(self.optimizers, whole.pop("optimizer_states"), strict=True):
            named = {
                name: {key: _as_sharded(value, parameters[name]) for key, value in slots.items()}
                for name, slots in state_by_name(state).items()
            }
            optimizer.load_state_dict({"state": named})
        return whole


def _as_sharded(value: Any, parameter: Tensor) -> Any:
    """This rank's slice of a state that has the shape of its parameter; a step count stays whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class AnyCheckpoint(TorchCheckpointIO):
    """Reads a checkpoint for a strategy that holds everything on each rank, whichever strategy wrote it."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning keeps it in one file."""
        if Path(path).is_dir():
            return states.read_sharded(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)
