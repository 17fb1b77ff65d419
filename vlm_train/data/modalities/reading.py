"""What a sample brings beside its image and its text, by the name of the modality: one reader for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_train.data.modalities.audio import decode_audio, read_audio
from vlm_train.data.modalities.depth import decode_depth, read_depth
from vlm_train.data.modalities.members import DEPTH, MOTION, audio_member
from vlm_train.data.modalities.motion import decode_motion, read_motion
from vlm_train.data.modalities.regions import read_regions
from vlm_train.data.transforms import Plan
from vlm_train.types import ModalitySpec

Read = Callable[[Mapping[str, bytes], Mapping[str, Any], Plan, tuple[int, ...]], "NDArray[Any] | None"]
"""(parts, KEY.json, what is done to the image, shape) -> an array of that shape, or None where the sample has none of
it. Raises SampleError for what is there and cannot be used."""


_SECONDS = 10.0


class _Reader(NamedTuple):
    read: Read
    dtype: torch.dtype


_READERS = {
    "regions": _Reader(read_regions, torch.int64),
    "depth": _Reader(read_depth, torch.float32),
    "audio": _Reader(read_audio, torch.float32),
    "motion": _Reader(read_motion, torch.float32),
}


def read(
    spec: ModalitySpec, parts: Mapping[str, bytes], metadata: Mapping[str, Any], plan: Plan
) -> NDArray[Any] | None:
    """What the sample has of the modality, of shape `spec.shape`; None where it has none.

    Raises:
        SampleError: there is something, and it cannot be used.
    """
    return _READERS[spec.name].read(parts, metadata, plan, spec.shape)


def room(spec: ModalitySpec, num_rows: int) -> Tensor:
    """Zeros for the rows of a batch."""
    return torch.zeros(num_rows, *spec.shape, dtype=_READERS[spec.name].dtype)


def check(parts: Mapping[str, bytes]) -> None:
    """Decodes the members of modalities that are there, of a sound some seconds. Raises SampleError."""
    if DEPTH in parts:
        decode_depth(parts[DEPTH])
    if name := audio_member(parts):
        decode_audio(parts[name], _SECONDS)
    if MOTION in parts:
        decode_motion(parts[MOTION])
