"""How many samples a dataset has, where a manifest tells it already: nothing is indexed for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_train.data.home import Home, name_in
from vlm_train.data.indexing import FOLDER
from vlm_train.data.patterns import expand_shards
from vlm_train.errors import VlmError
from vlm_train.locations import is_remote


def known_samples(data: Mapping[str, Any]) -> int | None:
    """Samples of the training split; None where it is a mixture, a selection or not here, or has no manifest yet."""
    patterns = data["train"]["shards"]
    if isinstance(patterns, Mapping) or data["selection"] or data["streaming"] or not patterns:
        return None
    try:
        shards = [str(shard) for shard in expand_shards(patterns)]
    except VlmError:
        return None
    if any(is_remote(shard) or not Path(shard).is_file() for shard in shards):
        return None
    entries: dict[str, int] = {}
    for folder in {Path(shard).parent for shard in shards}:
        found = Home.load(folder / FOLDER).entries
        entries |= {str(folder / name): entry["num_samples"] for name, entry in found.items()}
    names = [str(Path(shard).parent / name_in(shard)) for shard in shards]
    return sum(entries[name] for name in names) if entries.keys() >= set(names) else None
