"""Words about where bytes lie: locations, what may be shown of them, and the face that every shard has.

A location is an absolute path, or a URL of `http`, `https`, `s3` or `gs`. URLs may carry secrets: a password before the
`@`, a signature after the `?`. Whatever is shown, logged or written to a file goes through `shown`; whatever stands for
a shard from one run to the next goes through `identity`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

SCHEMES = ("https", "http", "s3", "gs")

Range = tuple[int, int]
"""(offset, length) in bytes."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_SIGNATURE = re.compile(
    r"x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|sig|se|st|sv|sp|sr"
)


@dataclass(frozen=True)
class Stat:
    """`size` in bytes; `version` changes when the content changes (time in ns, entity tag, or last modification)."""

    size: int
    version: str


@dataclass(frozen=True)
class StorageOptions:
    """How servers are treated and how much of their shards is kept here. Local files need none of it.

    Args:
        cache_gb: the most that shards of servers take on the local disk, 10^9 bytes; 0 keeps none.
        retry_seconds: how long one read goes on trying when a server does not answer.
        timeout_seconds: how long one request may go without a byte of progress.
    """

    cache_gb: float = 20.0
    retry_seconds: float = 300.0
    timeout_seconds: float = 60.0


class File(Protocol):
    """One shard on a disk or on a server. May be pickled, and used after a fork."""

    @property
    def location(self) -> str:
        """An absolute path, or a URL. It may hold secrets: show `shown(location)`."""

    @property
    def name(self) -> str:
        """The last component of the path."""

    def stat(self) -> Stat:
        """Size and version as they are now. Raises OSError when they cannot be had."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly that range, shorter only at the end of the file. Raises OSError when it cannot be had."""

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """Every (offset, length), in the order asked; neighbours are joined and requests run at once where it pays."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL of a server that shards are read from."""
    return location.partition("://")[0].lower() in SCHEMES and "://" in location


def name_of(location: str) -> str:
    """The last component of the path, without query."""
    if not is_remote(location):
        return posixpath.basename(location)
    return unquote(posixpath.basename(_split(location).path))


def server_of(location: str) -> str:
    """`https://host:port` or `s3://bucket`: what answers or does not answer as one."""
    parts = _split(location)
    return f"{parts.scheme.lower()}://{_host(parts.netloc)}"


def shown(location: str) -> str:
    """The location without password and query: safe in a message, a log and a file."""
    if "://" not in location:
        return location
    parts = _split(location)
    return urlunsplit((parts.scheme, _host(parts.netloc), parts.path, "", ""))


def scrubbed(text: str) -> str:
    """A text in which every URL is `shown`."""
    return _URL.sub(lambda match: shown(match[0]), text)


def identity(location: str) -> str:
    """What stays the same when a URL is signed anew: without password and without the parameters of a signature.

    Other parameters stay, for they may name the file; so this is for hashing, not for showing.
    """
    if not is_remote(location):
        return location
    parts = _split(location)
    kept = [(key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True)]
    query = urlencode([(key, value) for key, value in kept if not _SIGNATURE.fullmatch(key.lower())])
    return urlunsplit((parts.scheme.lower(), _host(parts.netloc), parts.path, query, ""))


def _split(location: str):
    """As `urlsplit`, but `?` and `#` belong to the name of an object in a bucket."""
    if location.partition("://")[0].lower() in ("s3", "gs"):
        scheme, _, rest = location.partition("://")
        bucket, slash, key = rest.partition("/")
        return urlsplit(f"{scheme}://{bucket}")._replace(path=slash + key)
    return urlsplit(location)


def _host(netloc: str) -> str:
    return netloc.rpartition("@")[2]
