"""Words about where bytes lie: locations, and what may be shown of them.

A location is an absolute path, or a URL of `http`, `https`, `s3` or `gs`. URLs may carry secrets: a password before the
`@`, a signature after the `?`. Whatever is shown, logged or written to a file goes through `shown`; whatever stands for
a shard from one run to the next goes through `identity`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

SCHEMES = ("https", "http", "s3", "gs")

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_URL = re.compile(rf"{_SCHEME}(?:(?!,{_SCHEME})[^\s'\"<>])+")
_SIGNATURE = re.compile(
    r"x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|sig|se|st|sv|sp|sr"
)


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
    host = _host(parts.netloc)
    path = parts.path if parts.netloc.endswith(host) else "/..."  # a `/` in a password that should have been quoted
    return urlunsplit((parts.scheme, host, path, "", ""))


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


def in_texts(change: Callable[[str], str], value: Any) -> Any:
    """A config value, or a tree of them, with every text changed: `in_texts(scrubbed, config)`."""
    if isinstance(value, Mapping):
        return {key: in_texts(change, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [in_texts(change, part) for part in value]
    return change(value) if isinstance(value, str) else value


def _split(location: str) -> SplitResult:
    """As `urlsplit`, but `?` and `#` belong to the name of an object in a bucket, and what is no URL is split too."""
    scheme, _, rest = location.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() in ("s3", "gs"):
        return SplitResult(scheme, host, slash + path, "", "")
    try:
        return urlsplit(location)
    except ValueError:  # brackets that hold no address: no server is called that, but a message must show it
        path, _, query = path.partition("?")
        return SplitResult(scheme, host, slash + path, query, "")


def _host(netloc: str) -> str:
    """Without user and password; of a user and a password that breaks off before its `@`, the user alone."""
    host = netloc.rpartition("@")[2]
    name, _, port = host.rpartition(":")
    return name if name and port and not port.isdecimal() and not host.endswith("]") else host
