"""The bytes of a shard from the first to the last, unpacked where it is compressed.

Disks and servers that give ranges are read piece by piece (`storage`), so a request that fails is repeated; of a web
server without ranges one answer is read from its beginning to its end, as long as its connection holds. What a decoder
made before it met damage is given out, and nothing that follows a compressed stream is passed over in silence.
"""

from __future__ import annotations

import base64
import bz2
import dataclasses
import io
import itertools
import lzma
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from vlm_train.data.files import File, StorageOptions
from vlm_train.data.storage import open_file
from vlm_train.errors import DataError

_PIECE = 8 << 20
_RECEIVED = 1 << 17
_SLICE = 1 << 14  # of compressed bytes: what is lost at most before the place where they are damaged
_ZSTD_SLICE = 1 << 12  # the same of what comes out: a read of pyarrow's that meets damage loses what it had got


def unpacked(location: str, options: StorageOptions | None = None) -> Iterator[bytes]:
    """The pieces of a shard, compressed (gzip, bzip2, xz, zstd) or not, none of them empty.

    Raises:
        DataError: a package is missing that this kind of server needs.
        Exception: it cannot be opened or, later, be read on; each library has its own family.
    """
    pieces = _pieces(location, options or StorageOptions())
    magic = b""
    while len(magic) < max(map(len, _DECODERS)) and (piece := next(pieces, None)) is not None:
        magic += piece
    pieces = itertools.chain([magic], pieces)
    decode = next((decode for prefix, decode in _DECODERS.items() if magic.startswith(prefix)), None)
    return filter(None, decode(pieces) if decode else pieces)


def _pieces(location: str, options: StorageOptions) -> Iterator[bytes]:
    file = open_file(location, dataclasses.replace(options, cache_gb=0))
    try:
        file.stat()
    except DataError:
        if not location.lower().startswith(("http://", "https://")):
            raise
        return _answer(location, options.timeout_seconds)
    return _ranges(file)


def _ranges(file: File) -> Iterator[bytes]:
    offset = 0
    while piece := file.read(offset, _PIECE):
        yield piece
        offset += len(piece)


def _answer(location: str, patience: float) -> Iterator[bytes]:
    """The body of one answer of a web server: all that comes before its connection breaks, and then an error. (aiohttp
    would throw away what it holds when that happens, and what is read were a matter of luck.)"""
    with urllib.request.urlopen(_request(location), timeout=patience) as answer:
        length = None if answer.chunked else answer.headers["Content-Length"]
        num_left = None if length is None else int(length)
        while num_left != 0 and (piece := answer.read1(_RECEIVED)):
            yield piece
            num_left = None if num_left is None else num_left - len(piece)
    if num_left:
        raise ConnectionError(f"the connection broke {num_left} bytes before the end")


def _request(location: str) -> urllib.request.Request:
    """A request for all of a file, with the headers that fsspec is told to send to web servers."""
    import fsspec
    import yarl

    url = yarl.URL(location, encoded="%" in location)
    headers = fsspec.filesystem("http", asynchronous=True, skip_instance_cache=True).client_kwargs.get("headers", {})
    request = urllib.request.Request(str(url.with_user(None)), headers={"Accept-Encoding": "identity", **headers})
    if url.user is not None:
        secret = base64.b64encode(f"{url.user}:{url.password or ''}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


class _Gunzip:
    """zlib's decoder with the face of those of bz2 and lzma. A slice gives at most 17 MB."""

    needs_input = True

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """All that `data` gives."""
        return self._inner.decompress(data)

    @property
    def eof(self) -> bool:
        """Whether the stream is over."""
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        """What came after it."""
        return self._inner.unused_data


def _decoded(make: Callable[[], Any], pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The content of compressed streams, one after the other; zeros between and behind them are padding."""
    decoder = None
    for data in _sliced(pieces):
        while data := data if decoder else data.lstrip(b"\0"):
            decoder = decoder or make()
            yield decoder.decompress(data, _PIECE)
            while not (decoder.eof or decoder.needs_input):
                yield decoder.decompress(b"", _PIECE)
            data = decoder.unused_data
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise EOFError("the compressed bytes stop in the middle")


def _sliced(pieces: Iterator[bytes]) -> Iterator[bytes]:
    return (piece[start : start + _SLICE] for piece in pieces for start in range(0, len(piece), _SLICE))


class _Readable(io.RawIOBase):
    """Pieces as the file that a decoder of pyarrow wants."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._piece = pieces, memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer, or a part of it; 0 at the end."""
        self._piece = self._piece or memoryview(next(self._pieces, b""))
        num = min(len(buffer), len(self._piece))
        buffer[:num], self._piece = self._piece[:num], self._piece[num:]
        return num


def _decoded_zstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(pa.PythonFile(_Readable(pieces), mode="r"), "zstd")
    while piece := stream.read(_ZSTD_SLICE):
        yield piece


_DECODERS: dict[bytes, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
    b"\x1f\x8b": lambda pieces: _decoded(_Gunzip, pieces),
    b"BZh": lambda pieces: _decoded(bz2.BZ2Decompressor, pieces),
    b"\xfd7zXZ": lambda pieces: _decoded(lzma.LZMADecompressor, pieces),
    b"\x28\xb5\x2f\xfd": _decoded_zstd,
}
