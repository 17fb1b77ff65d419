"""What a model makes of the samples of a manifest, as steps of curation take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.manifest import Manifest

Side = Literal["image", "text"]


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """`features` float32 [M, D], unit rows, of `rows` int64 [M], ascending: those that the run can read. These are the
    same rows on both sides."""

    features: NDArray[np.float32]
    rows: NDArray[np.int64]


class Models(Protocol):
    """Trained runs, by their folders or those of checkpoints."""

    def identity(self, run: str) -> str:
        """A name of the run's weights, which changes with them. Raises ConfigError where there is no such run."""

    def embed(self, manifest: Manifest, run: str, side: Side) -> Embedded:
        """All samples of a manifest that the run can read, each by its first image or its first caption."""
