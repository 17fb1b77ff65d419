"""Files on servers: `https://`, `http://`, `s3://` and `gs://`, read in ranges through fsspec's file systems.

Each process has one event loop in a thread, made when it is first needed. A fork gets none of it: loops and connections
do not survive one, so a child makes its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from vlm_train.data.files import Range, Stat, StorageOptions
from vlm_train.data.filesystems import Bucket, System, Web
from vlm_train.data.ranges import clamp, coalesce, cut, split
from vlm_train.data.retry import Changed, Server, ShortAnswer, persistently
from vlm_train.locations import name_of, server_of

MAX_REQUESTS = 16
"""Requests of one read that run at once."""
PIECE = 8 * 1024 * 1024
"""Bytes of one request at most: what is lost when a connection breaks."""

Result = TypeVar("Result")


class RemoteFile:
    """A file on a server, without a cache.

    Args:
        location: a URL.
        options: how long to wait and to try again.
        known: size and version, where they are known already.
    """

    def __init__(self, location: str, options: StorageOptions, known: Stat | None = None) -> None:
        self.location, self.options, self.known = location, options, known
        self.bytes_read = 0  # from the server, by this object
        self.requests = 0

    @property
    def name(self) -> str:
        """The last component of the path."""
        return name_of(self.location)

    def stat(self) -> Stat:
        """Size and version (entity tag, else time of the last modification, else size), asked for anew.

        Raises:
            OSError: as `retry.persistently`.
            DataError: the server does not give ranges.
        """
        self.requests += 1
        link = _Link(self.location, self.options)
        self.known = link.run(link.ask(lambda system: system.stat(self.location)))
        return self.known

    def read(self, offset: int, length: int) -> bytes:
        """Exactly that range, shorter only at the end of the file."""
        return self.read_many([(offset, length)])[0]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The ranges in the order asked, by few requests; in all at most 1.15 times the bytes wanted are read."""
        wanted = clamp(ranges, self._size())
        requests = coalesce(wanted)
        parts: dict[int, bytes] = {}
        self.fetch(list(split(requests, PIECE)), parts.__setitem__)
        chunks = [b"".join(parts[offset] for offset, _ in split([request], PIECE)) for request in requests]
        return cut(wanted, requests, chunks)

    def fetch(self, ranges: Sequence[Range], sink: Callable[[int, bytes], None]) -> None:
        """Exactly these ranges, each one request; `sink(offset, data)` as they come, in any order, one at a time.

        Raises:
            OSError: as `retry.persistently`, or what the sink raised.
            DataError: the server does not give ranges.
        """
        if ranges:
            link = _Link(self.location, self.options)
            link.run(self._fetch(link, ranges, sink))

    async def _fetch(self, link: _Link, ranges: Sequence[Range], sink: Callable[[int, bytes], None]) -> None:
        slots = asyncio.Semaphore(MAX_REQUESTS)

        async def one(offset: int, length: int) -> None:
            async with slots:
                sink(offset, await link.ask(lambda system: self._get(system, offset, length), num_bytes=length))

        tasks = [asyncio.ensure_future(one(*item)) for item in ranges]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _get(self, system: System, offset: int, length: int) -> bytes:
        self.requests += 1
        data = await system.read(self.location, offset, offset + length)
        self.bytes_read += len(data)
        if len(data) == length:
            return data
        now = await system.stat(self.location)
        if self.known and now.size != self.known.size:
            raise Changed(f"it has {now.size} bytes now, and had {self.known.size}")
        raise ShortAnswer(f"{len(data)} bytes instead of {length}")

    def _size(self) -> int:
        return (self.known or self.stat()).size


def find(pattern: str, options: StorageOptions) -> list[str]:
    """The URLs of the files in a bucket that a glob matches, sorted.

    Raises:
        OSError: as `retry.persistently`.
    """
    link = _Link(pattern, options)
    return sorted(link.run(link.ask(lambda system: system.find(pattern))))


class _Link:
    """The way to one location's server, by the event loop of this process."""

    def __init__(self, location: str, options: StorageOptions) -> None:
        client = _client()
        self.run = client.run
        self._system, self._server = client.system(location, options), client.server(location)
        self._location, self._options = location, options

    async def ask(self, request: Callable[[System], Awaitable[Result]], num_bytes: int = 0) -> Result:
        """The request's result, with all patience that the options allow."""
        return await persistently(
            lambda: request(self._system),
            server=self._server,
            location=self._location,
            options=self._options,
            num_bytes=num_bytes,
        )


class _Client:
    """The event loop of this process, its file systems, and what it knows of servers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._systems: dict[tuple[str, float], System] = {}
        self._servers: dict[str, Server] = {}
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="storage", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def system(self, location: str, options: StorageOptions) -> System:
        scheme = location.partition("://")[0].lower()
        key = ("http" if scheme == "https" else scheme, options.timeout_seconds)
        with self._lock:
            if key not in self._systems:
                self._systems[key] = Web(key[1]) if key[0] == "http" else Bucket(*key)
            return self._systems[key]

    def server(self, location: str) -> Server:
        with self._lock:
            name = server_of(location)
            return self._servers.setdefault(name, Server(name))

    def close(self) -> None:
        """Ends connections and thread, so that nothing is complained of when the interpreter ends."""

        async def close_all() -> None:
            closing = (asyncio.wait_for(system.close(), 2.0) for system in self._systems.values())
            await asyncio.gather(*closing, return_exceptions=True)
            self.loop.stop()

        asyncio.run_coroutine_threadsafe(close_all(), self.loop)
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self.loop.close()


_clients: list[_Client] = []
_inherited: list[_Client] = []
_creating = threading.Lock()


def _client() -> _Client:
    with _creating:
        if not _clients:
            _clients.append(_Client())
        return _clients[0]


def _forget() -> None:
    """In a forked child: the parent's loop is kept, for closing it would meddle with the parent's connections."""
    global _creating
    _creating = threading.Lock()
    for client in _clients:
        client.loop.set_exception_handler(lambda loop, context: None)
    _inherited.extend(_clients)
    _clients.clear()


@atexit.register
def close_connections() -> None:
    """Ends all connections of this process. The next read makes new ones, by what the environment says then."""
    while _clients:
        _clients.pop().close()


os.register_at_fork(after_in_child=_forget)
