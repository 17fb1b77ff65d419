"""The files of a feature store: records that any number of processes read while each writes to a pair of its own.

`NAME.features` has records of one size one behind the other: what a tower made of a picture, and behind it the checksum
of the picture's key and of that. `NAME.index` has a header, which says what a record is, and the key of each record in
order. A record is written before its key. So what ends a process at any instant leaves at most records without a key
and a part of a key, neither of which counts; and a machine that stops, or a disk that forgets, may leave anything: a
record that its checksum does not confirm was never there.

Files are read and not mapped: a map of a file that somebody cuts short ends the process that looks.
"""

from __future__ import annotations

import glob
import os
import struct
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_train.log import get_logger

LOG = get_logger(__name__)
KEY_BYTES, CHECK_BYTES = 16, 4
_HEADER = struct.Struct("<8sII12sI")
_MAGIC = b"features"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True, slots=True)
class Form:
    """What the features of a picture are: [num_tokens, width] of `dtype`."""

    num_tokens: int
    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of a picture, without the checksum."""
        return self.num_tokens * self.width * self.dtype.itemsize

    def header(self) -> bytes:
        """As an index begins."""
        values = (_MAGIC, self.num_tokens, self.width, str(self.dtype).removeprefix("torch.").encode())
        return _HEADER.pack(*values, zlib.crc32(_HEADER.pack(*values, 0)))

    @staticmethod
    def read(header: bytes) -> Form | None:
        """None of what is no header, or is not whole yet."""
        if len(header) < _HEADER.size:
            return None
        _, num_tokens, width, name, _ = _HEADER.unpack(header)
        dtype = _DTYPES.get(name.rstrip(b"\0").decode(errors="replace"))
        form = None if dtype is None else Form(num_tokens, width, dtype)
        return form if form is not None and form.header() == header else None


def rows_of(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of each row of a tensor [N, ...], on the host: [N, bytes]."""
    return tensor.detach().cpu().contiguous().reshape(len(tensor), -1).view(torch.uint8).numpy()


def check_of(features: NDArray[np.uint8], key: bytes) -> bytes:
    """What stands behind the features of the picture with this key: CRC-32, a quarter of the time of a hash."""
    return zlib.crc32(features.data, zlib.crc32(key)).to_bytes(CHECK_BYTES, "little")


class FeatureFiles:
    """A folder of features of one tower.

    Args:
        folder: need not be there.
        limit: bytes that all folders beside this one, and itself, may take; each process may go beyond it by what it
            adds at once.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._readers: dict[str, _Reader] = {}
        self._writer: _Writer | None = None
        self._writes = True

    def read(self, keys: Sequence[bytes]) -> Tensor | None:
        """Features [N, P, D] of the pictures with these keys, on the host; None unless all of them are there."""
        if any(self._reader_of(key) is None for key in keys):
            self._refresh()
        first = self._reader_of(keys[0])
        if first is None or first.form is None or any(self._reader_of(key) is None for key in keys):
            return None
        form = first.form  # one tower gives features of one form
        features = torch.empty(len(keys), form.num_tokens, form.width, dtype=form.dtype)
        rows = features.flatten(1).view(torch.uint8).numpy()
        return features if all(self._fill(row, key) for row, key in zip(rows, keys, strict=True)) else None

    def _fill(self, row: NDArray[np.uint8], key: bytes) -> bool:
        """From the first record of this key that is whole."""
        while (reader := self._reader_of(key)) is not None:
            if reader.read(key, row):
                return True
        return False

    def add(self, keys: Sequence[bytes], features_NPD: Tensor) -> None:
        """Keeps what is not there yet. Where that cannot be, a warning says so, and nothing more is kept."""
        new = {key: row for row, key in enumerate(keys) if self._reader_of(key) is None}
        if not new or not self._writes:
            return
        form = Form(features_NPD.shape[1], features_NPD.shape[2], features_NPD.dtype)
        try:
            if self._used() + len(new) * (form.num_bytes + CHECK_BYTES + KEY_BYTES) > self.limit:
                self._stop(f"it has the {self.limit / 1e9:g} GB of strategy.feature_store_gb")
                return
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._writer = _Writer(self.folder, form)
            self._writer.append(list(new), rows_of(features_NPD)[list(new.values())])
        except OSError as error:
            self._stop(str(error))

    def _stop(self, reason: str) -> None:
        LOG.warning("the feature store in %s takes nothing more: %s", self.folder.parent, reason)
        self._writes = False
        if self._writer is not None:
            self._writer.close()

    def _reader_of(self, key: bytes) -> _Reader | None:
        return next((reader for reader in self._readers.values() if key in reader.slots), None)

    def _refresh(self) -> None:
        """Reads the keys that were added since, by whichever process."""
        names: set[str] = set()
        with suppress(OSError):  # what cannot be looked at is not there; whoever writes there is told why
            names = {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".index")}
        for name in sorted(names - self._readers.keys()):
            with suppress(OSError):
                self._readers[name] = _Reader(self.folder / name)
        for reader in self._readers.values():
            with suppress(OSError):
                reader.refresh()

    def _used(self) -> int:
        """Bytes of the files of all towers; whatever else lies there, or goes away meanwhile, is nothing."""
        towers = os.path.join(glob.escape(str(self.folder.parent)), "*")
        files = [path for suffix in ("features", "index") for path in glob.iglob(os.path.join(towers, f"*.{suffix}"))]
        return sum(_size_of(path) for path in files)


class _Reader:
    """One pair of files, which may still grow."""

    def __init__(self, index: Path) -> None:
        self.form: Form | None = None
        self.slots: dict[bytes, int] = {}  # key -> number of the record
        self._num_keys = 0
        self._index = index.open("rb", buffering=0)
        self._features = index.with_suffix(".features").open("rb", buffering=0)

    def refresh(self) -> None:
        """Reads the whole keys that came since."""
        if self.form is None:
            self.form = Form.read(os.pread(self._index.fileno(), _HEADER.size, 0))
        if self.form is None:
            return
        start = _HEADER.size + self._num_keys * KEY_BYTES
        size = os.fstat(self._index.fileno()).st_size
        content = os.pread(self._index.fileno(), max(0, size - start), start)
        for offset in range(0, len(content) // KEY_BYTES * KEY_BYTES, KEY_BYTES):
            self.slots[content[offset : offset + KEY_BYTES]] = self._num_keys
            self._num_keys += 1

    def read(self, key: bytes, row: NDArray[np.uint8]) -> bool:
        """Fills a row with the features of a picture that has a slot; False, and no slot any more, if they are not
        those that were written."""
        check = bytearray(CHECK_BYTES)
        offset = self.slots[key] * (len(row) + CHECK_BYTES)
        with suppress(OSError):
            num_read = os.preadv(self._features.fileno(), [row.data, check], offset)
            if num_read == len(row) + CHECK_BYTES and check_of(row, key) == check:
                return True
        del self.slots[key]
        return False


class _Writer:
    """The pair of files of this process."""

    def __init__(self, folder: Path, form: Form) -> None:
        name = uuid.uuid4().hex
        self._features = (folder / f"{name}.features").open("xb", buffering=0)
        self._index = (folder / f"{name}.index").open("xb", buffering=0)
        _write(self._index.fileno(), form.header())

    def append(self, keys: Sequence[bytes], features: NDArray[np.uint8]) -> None:
        """Records [N, bytes], then their keys. Raises OSError, after which nothing may be appended."""
        checks = [np.frombuffer(check_of(row, key), np.uint8) for key, row in zip(keys, features, strict=True)]
        _write(self._features.fileno(), np.concatenate([features, np.stack(checks)], axis=1).tobytes())
        _write(self._index.fileno(), b"".join(keys))

    def close(self) -> None:
        """Gives the files back."""
        self._features.close()
        self._index.close()


def _size_of(path: str) -> int:
    with suppress(OSError):
        return os.lstat(path).st_size
    return 0


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
