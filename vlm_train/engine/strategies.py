"""Lightning's strategies where ours differ: a checkpoint of one is a checkpoint of every other.

A strategy that holds everything on each rank writes one file; a sharded one a folder with a file of each rank. Both
name parameters and their optimizer state by the parameter's name, so either can be read into any number of ranks.
Lightning gathers the state; `saving.py` writes it, so what Lightning calls saving only keeps what was gathered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm_train.engine import states
from vlm_train.engine.optim import state_by_name
from vlm_train.engine.saving import State


def state_of(trainer: lightning.Trainer) -> State:
    """The complete state of a run, its tensors those that train, not copies. Collective."""
    trainer.save_checkpoint("")  # to `save_checkpoint` below, on the ranks that have something to write
    strategy = trainer.strategy
    keeper = strategy if isinstance(strategy, Sharded) else strategy.checkpoint_io
    assert isinstance(keeper, Sharded | AnyCheckpoint)
    content, keeper.gathered = keeper.gathered, None
    return State(content=content, is_sharded=isinstance(keeper, Sharded))


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks. Reads the files of other strategies too."""

    gathered: dict[str, Any] | None = None

    def __init__(self, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's slices, where they are: Lightning's would copy them to the host, and not into pinned memory."""
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Likewise, by the names of parameters."""
        assert self.model is not None
        return get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Keeps it for `state_of`."""
        self.gathered = checkpoint

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

    gathered: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Keeps it for `state_of`; of several ranks only the first is asked."""
        self.gathered = checkpoint

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning keeps it in one file."""
        if Path(path).is_dir():
            return states.read_sharded(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)
