"""A step without its numbers: every operation runs, tensors have shapes and types alone, and what they would take is
counted.

torch's fake tensors stand for what lies on the device. What a batch says in whole numbers (ids, lengths, masks) is
known beforehand, stays real and is computed with, since models ask it how long their texts are. The device is called
"cpu", where torch picks attention that keeps as little as a GPU's does; where autocast on a GPU differs, `like_a_gpu`
does as that does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WIDE_ON_A_GPU = (F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm)
"""What autocast computes in fp32 on a GPU and leaves in low precision on a CPU."""


class Live(TorchDispatchMode):
    """Counts the bytes of storages that were made under it and are still there; `peak`: the most at any time.

    Args:
        there: tensors of before, of which an operation may give a view; whoever counts holds them.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._before = {tensor.untyped_storage()._cdata for tensor in there}
        self._numbers: dict[int, int] = {}  # address of a storage -> its number
        self._history: list[tuple[int, int]] = []  # (number, bytes that came or went)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def peak_without(self, tensors: Sequence[Tensor]) -> int:
        """As `peak`, when these tensors, which are still there, count for nothing."""
        left_out = {self._numbers.get(tensor.untyped_storage()._cdata) for tensor in tensors}
        total = most = 0
        for number, change in self._history:
            total += 0 if number in left_out else change
            most = max(most, total)
        return most

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._numbers or storage._cdata in self._before:
            return
        number, size = len(self._history), storage.nbytes()
        self._numbers[storage._cdata] = number
        self._change(number, size)
        weakref.finalize(storage, self._forget, storage._cdata, number, size)

    def _forget(self, address: int, number: int, size: int) -> None:
        del self._numbers[address]
        self._change(number, -size)

    def _change(self, number: int, size: int) -> None:
        self._history.append((number, size))
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class _KnownOnTheHost(TorchDispatchMode):
    """What is computed from real tensors alone is real; a choice of rows by a real mask has its real number of rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if tensors and not any(isinstance(value, FakeTensor) for value in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
            args = (args[0], _as_places(args[1]), *args[2:])
        return func(*args, **kwargs)


def _as_places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Real masks as the places where they are true."""
    places: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        if is_mask and index is not None:
            with unset_fake_temporarily():
                places += index.nonzero().unbind(1)
        else:
            places.append(index)
    return places


class _LikeAGpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WIDE_ON_A_GPU and torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(value) for value in args)
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class Shapes:
    """The world in which tensors have shapes alone."""

    def __init__(self) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def running(self, *, like_a_gpu: bool = False) -> Iterator[None]:
        """Inside, what is made on the device has a shape alone."""
        with ExitStack() as stack:
            if like_a_gpu:
                stack.enter_context(_LikeAGpu())
            stack.enter_context(self._fake)
            stack.enter_context(_KnownOnTheHost())
            yield

    def place(self, module: nn.Module) -> None:
        """Parameters and buffers of a module on the meta device come to the device, without memory. In place."""
        with self._fake:
            module.to_empty(device="cpu")

    def of_bytes(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Tensors of these shapes and types on the device."""
        with self._fake:
            return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
