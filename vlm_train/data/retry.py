"""How long a server is asked again, what is asked again at all, and what the user reads meanwhile.

Asked again: refused and reset connections, time-outs, answers cut short, and the statuses 408, 425, 429 and 5xx. Every
other answer (404, 403, ...) is final at once. The wait doubles from half a second to 15 s, with a random part so that
many readers do not come back at the same moment; it is drawn from the system, not from a generator that training uses.
"""

from __future__ import annotations

import asyncio
import errno
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from vlm_train.data.files import StorageOptions
from vlm_train.errors import DataError
from vlm_train.locations import scrubbed, shown
from vlm_train.log import get_logger

log = get_logger(__name__)

FIRST_DELAY, LAST_DELAY = 0.5, 15.0
WARN_EVERY = 30.0
GIVEN_UP_TIMEOUT = 5.0
MIN_RATE = 10_000
"""Bytes per second: a request that is slower as a whole has stalled, whatever still drips."""

_RETRIED = {408, 425, 429}
_TRANSIENT = (OSError, asyncio.TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
_TRANSIENT_NAMES = {  # of botocore and google-auth, which need not be installed
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "TransportError",
}  # fmt: skip
_WAY_OUT = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE); FSSPEC_S3_ANON=true for a public bucket",
    "gs": "`gcloud auth application-default login`, GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_GS_TOKEN=anon",
    "http": "give a URL that may be read: https://user:password@host/..., or a signed one that has not expired",
}

Result = TypeVar("Result")


class ShortAnswer(OSError):
    """Fewer bytes than the file has in that range."""


class Changed(OSError):
    """The file on the server is not the one that was asked about before."""


class Server:
    """What this process knows of one server's health."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given_up = False
        self._failing_since: float | None = None
        self._warned_at = -WARN_EVERY
        self._owes_word = False  # a warning stands that nothing has taken back

    def answered(self) -> None:
        """It is there, whatever it said."""
        if self._failing_since is not None and self._owes_word:
            log.info("%s answers again after %.0f s", self.name, time.monotonic() - self._failing_since)
            self._owes_word = False
        self._failing_since, self.given_up = None, False

    def failed(self, reason: str) -> None:
        """Counts a failure, and says so at the first and then every `WARN_EVERY` seconds."""
        now = time.monotonic()
        self._failing_since = now if self._failing_since is None else self._failing_since
        if not self.given_up and now - self._warned_at >= WARN_EVERY:
            self._warned_at, self._owes_word = now, True
            seconds = now - self._failing_since
            log.warning("%s does not answer since %.0f s: %s; trying again", self.name, seconds, reason)


async def persistently(
    request: Callable[[], Awaitable[Result]],
    *,
    server: Server,
    location: str,
    options: StorageOptions,
    num_bytes: int = 0,
) -> Result:
    """The request's result; asked again for `options.retry_seconds` after its first failure.

    A server that used up this time once gets one try for each later request, until one succeeds: so a dead server ends
    a run soon, not after hours.

    Raises:
        FileNotFoundError, PermissionError: the server said so.
        OSError: another final answer, or the time is over.
        DataError: passed on from the request.
    """
    first_failure: float | None = None
    for num_tries, delay in enumerate(_delays(), start=1):
        silence = min(options.timeout_seconds, GIVEN_UP_TIMEOUT) if server.given_up else options.timeout_seconds
        try:
            result = await asyncio.wait_for(request(), silence + num_bytes / MIN_RATE)
        except DataError:
            raise
        except Exception as caught:  # each library has its own family
            error = caught
        else:
            server.answered()
            return result
        if not is_transient(error):
            server.answered()
            raise _final(error, location) from None
        first_failure = time.monotonic() if first_failure is None else first_failure
        waited = time.monotonic() - first_failure
        server.failed(reason := describe(error))
        if server.given_up or waited + delay > options.retry_seconds:
            server.given_up = True
            raise OSError(
                errno.EIO,
                f"the server did not answer in {num_tries} tries over {waited:.0f} s ({reason})",
                shown(location),
            ) from None
        await asyncio.sleep(delay)
    raise AssertionError("the delays do not end")


def _delays() -> Iterator[float]:
    """Seconds to wait after each failure, without end."""
    system, delay = random.SystemRandom(), FIRST_DELAY
    while True:
        yield min(LAST_DELAY, delay * system.uniform(1.0, 1.5))
        delay = min(LAST_DELAY, 2 * delay)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = _status(error)
    if status is not None:
        return status in _RETRIED or status >= 500 or isinstance(error, TimeoutError)
    if isinstance(error, FileNotFoundError | PermissionError | Changed) or str(error).startswith("Forbidden"):
        return False
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _chain(error)):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, _TRANSIENT) or bool(names & _TRANSIENT_NAMES)


def describe(error: BaseException) -> str:
    """One short line without secrets."""
    status = _status(error)
    if status is not None:
        return f"status {status}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = scrubbed(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _final(error: BaseException, location: str) -> OSError:
    status = _status(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "the server has no such file", shown(location))
    no_right = "NoCredentialsError" in names or "GoogleAuthError" in names or str(error).startswith("Forbidden")
    if status in (401, 403) or isinstance(error, PermissionError) or no_right:
        way_out = _WAY_OUT.get(location.partition("://")[0], _WAY_OUT["http"])
        return PermissionError(
            errno.EACCES, f"the server refuses to give it ({describe(error)}); {way_out}", shown(location)
        )
    return OSError(errno.EIO, f"the server cannot give it ({describe(error)})", shown(location))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, botocore or gcsfs stands for."""
    for link in _chain(error):
        if isinstance(link, HttpProcessingError):  # its `code` says what aiohttp would answer, were it the server
            continue
        response = getattr(link, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for value in (metadata.get("HTTPStatusCode"), getattr(link, "status", None), getattr(link, "code", None)):
            if isinstance(value, int | str) and str(value).isdigit() and int(value) >= 300:
                return int(value)
    return None
