"""The state in a checkpoint, whole and on the CPU, whichever strategy wrote it.

Apart from `checkpoints.py`, which knows folders and no torch: a command that is refused does not wait for its import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vlm_train.engine import checkpoints


def read_weights(path: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint by name, on the CPU, whatever strategy wrote it."""
    state = path / checkpoints.STATE
    if not state.is_dir():
        whole: dict[str, Tensor] = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return whole
    weights: dict[str, Tensor] = _read_tensors(state, ["state_dict"])["state_dict"]
    return weights


def read_sharded(state: Path) -> dict[str, Any]:
    """What a sharded strategy wrote, as Lightning keeps it in one file; optimizer states stand under names."""
    found = _read_tensors(state, ["state_dict", "optimizer_0"])
    rest: dict[str, Any] = torch.load(state / "meta.pt", map_location="cpu", weights_only=True)
    return {**rest, "state_dict": found["state_dict"], "optimizer_states": [found["optimizer_0"]]}


def _read_tensors(state: Path, roots: list[str]) -> dict[str, Any]:
    """Every tensor below `roots` of a sharded state, whole, in nested dicts."""
    reader = distributed_checkpoint.FileSystemReader(state)
    metadata = reader.read_metadata()
    found: dict[str, Any] = {}
    for name, about in metadata.state_dict_metadata.items():
        path = metadata.planner_data[name]
        if path[0] in roots and isinstance(about, TensorStorageMetadata):
            node = found
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = torch.empty(about.size, dtype=about.properties.dtype)
    distributed_checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found
