"""How each kind of server is asked: HTTP, and the buckets of S3 and Google Cloud Storage.

Where things are configured is fsspec's and the vendors' own business: `~/.config/fsspec/*.json`, variables
`FSSPEC_<SCHEME>_<OPTION>`, `AWS_*`, `GOOGLE_APPLICATION_CREDENTIALS`. A server of one's own that speaks S3, as MinIO
does, is named by `AWS_ENDPOINT_URL_S3` (or `AWS_ENDPOINT_URL`, or `FSSPEC_S3_ENDPOINT_URL`).
"""

from __future__ import annotations

from typing import Protocol

import aiohttp
import fsspec
import yarl

from vlm_train.data.files import Stat
from vlm_train.errors import DataError
from vlm_train.locations import shown

MAX_CONNECTIONS = 64


class System(Protocol):
    """One kind of server. Errors are the library's own; `retry` tells them apart."""

    async def stat(self, location: str) -> Stat:
        """Size and version of a file."""

    async def read(self, location: str, start: int, end: int) -> bytes:
        """The bytes [start, end) by one request."""

    async def find(self, pattern: str) -> list[str]:
        """The URLs of the files that a glob matches."""

    async def close(self) -> None:
        """Ends the connections."""


class Web:
    """HTTP. fsspec makes the session, so that its configuration counts (headers, proxies), but the requests are ours:
    its own take a whole file for a range, and any failure of a HEAD for a missing file."""

    def __init__(self, timeout: float) -> None:
        self._fs = fsspec.filesystem("http", asynchronous=True, skip_instance_cache=True)
        self._fs.client_kwargs = {"trust_env": True} | self._fs.client_kwargs
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)

    async def stat(self, location: str) -> Stat:
        """One byte is asked for: the answer has size and version, and a signed URL that allows GET may refuse HEAD."""
        async with await self._get(location, 0, 1) as answer:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status == 200 and answer.headers.get("Content-Length") == "0":
                total = "0"
            elif answer.status not in (206, 416) or not total.isdigit():
                raise _no_ranges(
                    location, f"status {answer.status}, Content-Range {answer.headers.get('Content-Range')}"
                )
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or total
            return Stat(size=int(total), version=version)

    async def read(self, location: str, start: int, end: int) -> bytes:
        """As `System.read`."""
        async with await self._get(location, start, end) as answer:
            span = answer.headers.get("Content-Range", "")
            if answer.status == 416:
                return b""
            if answer.status == 200 or not span.startswith(f"bytes {start}-"):
                raise _no_ranges(location, f"status {answer.status}, Content-Range {span or None}")
            return await answer.read()

    async def _get(self, location: str, start: int, end: int) -> aiohttp.ClientResponse:
        session = await self._fs.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        url = yarl.URL(location, encoded="%" in location)
        answer = await session.get(url, headers=headers, timeout=self._timeout)
        if answer.status >= 400 and answer.status != 416:
            answer.release()
            answer.raise_for_status()
        return answer

    async def find(self, pattern: str) -> list[str]:
        """As `System.find`."""
        raise DataError(f"{shown(pattern)}: HTTP has no listing", remedy="name the files, by a range {00000..00012}")

    async def close(self) -> None:
        """As `System.close`."""
        if self._fs._session is not None:
            await self._fs._session.close()


class Bucket:
    """S3 and Google Cloud Storage. The libraries' own repeats are switched off: one rule for all servers is ours."""

    def __init__(self, scheme: str, timeout: float) -> None:
        try:
            self._fs = fsspec.filesystem(scheme, asynchronous=True, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            extra = {"s3": "s3", "gs": "gcs"}[scheme]
            raise DataError(
                f"{scheme}:// needs a package that is not installed",
                got=error,
                remedy=f"pip install 'vlm-train[{extra}]'",
            ) from error
        self._scheme = scheme
        self._fs.retries = 1
        if scheme == "s3":
            waits = {"connect_timeout": timeout, "read_timeout": timeout, "max_pool_connections": MAX_CONNECTIONS}
            self._fs.config_kwargs = waits | {"retries": {"max_attempts": 0}} | self._fs.config_kwargs
        else:
            self._fs.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            once = getattr(type(self._fs)._request, "__wrapped__", None)
            self._fs._request = once.__get__(self._fs) if once else self._fs._request

    async def stat(self, location: str) -> Stat:
        """As `System.stat`; a folder is not a file."""
        info = await self._fs._info(location)
        if info.get("type") != "file":
            raise FileNotFoundError(location)
        facts = (info.get(key) for key in ("ETag", "etag", "LastModified", "updated"))
        return Stat(size=int(info["size"]), version=str(next((fact for fact in facts if fact), info["size"])))

    async def read(self, location: str, start: int, end: int) -> bytes:
        """As `System.read`."""
        return await self._fs._cat_file(location, start=start, end=end)

    async def find(self, pattern: str) -> list[str]:
        """As `System.find`."""
        return [f"{self._scheme}://{name}" for name in await self._fs._glob(pattern)]

    async def close(self) -> None:
        """As `System.close`."""
        if self._scheme == "s3" and self._fs._s3 is not None:
            await self._fs._s3creator.__aexit__(None, None, None)
        elif self._scheme == "gs" and self._fs._session is not None:
            await self._fs._session.close()


def _no_ranges(location: str, got: str) -> DataError:
    return DataError(
        f"the server of {shown(location)} does not give parts of a file",
        got=got,
        allowed="status 206 with Content-Range and the size of the file, for a request of a range",
        remedy="data.streaming=true reads shards from front to back; or download them and give their paths",
    )
