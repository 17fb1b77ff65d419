"""What a frozen image tower makes of pictures, kept on a disk: a batch that came before is read and not computed.

A picture is known by a hash of the very pixels that the tower is given. The features of one tower lie in a folder of
their own, named by a hash of everything else that they follow from (`fingerprint`): its weights, settings, arithmetic.

They are the bytes that the tower gave, and where a picture of a batch is not there the tower reads the whole batch, as
it would without a store. For what a tower makes of a picture may depend, in the last bits, on how many it reads with
it: the sums of a matrix product are ordered by its shape. So a run whose batches have one size is the run without a
store, bit by bit.

A tower whose weights are shared out between ranks is run by all of them or by none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from vlm_train.log import get_logger
from vlm_train.models.feature_files import KEY_BYTES, FeatureFiles, rows_of

LOG = get_logger(__name__)


class FeatureStore:
    """Reads features, or computes and keeps them.

    Args:
        folder: the store, which other runs and other towers may share.
        limit: bytes of the store.
        tower: whose features they are; from the first call on its weights stay as they are.
        settings: what else decides them, as a text.
        any_rank: element-wise maximum over ranks, called on each of them.
    """

    def __init__(
        self, *, folder: Path, limit: int, tower: nn.Module, settings: str, any_rank: Callable[[Tensor], Tensor]
    ) -> None:
        self.folder, self.limit, self.tower, self.settings = folder, limit, tower, settings
        self.num_read = self.num_computed = 0
        """Pictures so far."""
        self._any_rank = any_rank
        self._is_shared = False
        self._files: FeatureFiles | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureStore:
        """A copy of a model has the same store."""
        return self

    def __call__(self, images_N3SS: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The features [N, P, D] that `compute` gives of images as the tower is given them."""
        files = self._files or self._open(images_N3SS.device)
        keys = keys_of(images_N3SS)
        features_NPD = files.read(keys)
        if not self._is_absent(features_NPD is None, images_N3SS.device):
            assert features_NPD is not None
            self.num_read += len(keys)
            return features_NPD.to(images_N3SS.device)
        computed_NPD = compute(images_N3SS)
        files.add(keys, computed_NPD)
        self.num_computed += len(keys)
        return computed_NPD

    def _is_absent(self, is_absent: bool, device: torch.device) -> bool:
        """Whether the tower must run: here, or, where that takes all ranks, on any of them."""
        if not self._is_shared:
            return is_absent
        return bool(self._any_rank(torch.tensor(float(is_absent), device=device)))

    def _open(self, device: torch.device) -> FeatureFiles:
        """At the first batch: before, a checkpoint may still bring other weights."""
        self._is_shared = any(isinstance(parameter, DTensor) for parameter in self.tower.parameters())
        name = fingerprint(self.tower, f"{self.settings} {_name_of(device)} torch {torch.__version__}")
        self._files = FeatureFiles(self.folder / name, self.limit)
        LOG.info("features of the image tower are kept in %s", self._files.folder)
        return self._files


def reason_against(tower: nn.Module) -> str | None:
    """Why no store can serve a tower as it is now; None where one can."""
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return "the image tower learns, so what it makes of a picture changes"
    for name, part in tower.named_modules():
        if part.training and isinstance(part, _DropoutNd | _BatchNorm) and getattr(part, "p", 1.0) > 0:
            return f"{name} of the image tower gives a picture something else each time"
    return None


def keys_of(images_N3SS: Tensor) -> list[bytes]:
    """The hash of each picture's values, and of what type they are."""
    kind = str(images_N3SS.dtype).removeprefix("torch.").encode()
    rows = rows_of(images_N3SS)
    return [hashlib.blake2b(row.data, digest_size=KEY_BYTES, person=kind).digest() for row in rows]


def fingerprint(tower: nn.Module, settings: str) -> str:
    """A hash of a tower's weights and of what else decides its features, as 32 letters. Collective where its weights
    are shared out; the same as where they are not."""
    network_config = getattr(getattr(tower, "network", None), "config", None)  # of a tower of transformers
    digest = hashlib.blake2b(f"{settings} {network_config}".encode(), digest_size=16)
    digest.update(weights_digest(tower))
    return digest.hexdigest()


def weights_digest(tower: nn.Module) -> bytes:
    """A hash of all parameters and buffers, by name."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted([*tower.named_parameters(), *tower.named_buffers()], key=lambda named: named[0]):
        # a copy, since what was once shown to numpy can no longer be freed by a sharded strategy
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)} ".encode())
        digest.update(rows_of(whole[None]).data)
    return digest.digest()


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
