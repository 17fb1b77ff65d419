"""Features of pictures that are numbers, and a process that writes them until it is killed. Quick to import."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlm_train.models.feature_files import FeatureFiles

NUM_PICTURES, FORM = 12, (3, 5)
HUGE = 10**12


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def features_of(number: int) -> Tensor:
    return torch.randn(FORM, generator=torch.Generator().manual_seed(number))


def put(folder: Path, *numbers: int, limit: int = HUGE) -> FeatureFiles:
    files = FeatureFiles(folder, limit)
    files.add([key_of(number) for number in numbers], torch.stack([features_of(number) for number in numbers]))
    return files


def right(folder: Path, numbers: range = range(NUM_PICTURES)) -> set[int]:
    """Those that are there. Fails if one of them is not what was put."""
    files, found = FeatureFiles(folder, HUGE), set()
    for number in numbers:
        features = files.read([key_of(number)])
        if features is not None:
            assert torch.equal(features[0], features_of(number))
            found.add(number)
    return found


def write_until_killed(folder: str) -> None:
    """One picture, and then three after three."""
    files = put(Path(folder), 0)
    for first in range(1, 10**6, 3):
        numbers = range(first, first + 3)
        files.add([key_of(number) for number in numbers], torch.stack([features_of(number) for number in numbers]))


def read_where_nothing_may_be_written(folder: str) -> None:
    """Reads one picture of two; the other cannot be kept."""
    assert put(Path(folder), 0, 1).read([key_of(0)]) is not None
