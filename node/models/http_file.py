"""A file on a server, read by HTTP ranges, again from where it broke off when a connection breaks."""

import random
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from node.models.byte_source import PIECE_BYTES
from node.models.errors import ModelError, SourceError
from node.models.files import Progress, ignore_progress
from node.util.backoff import backoff_s
from node.util.text import one_line

if TYPE_CHECKING:
    import httpx

BACKOFF_S: Final = (0.5, 60.0)
"""Bounds of the pause before a request is repeated."""
MAX_FAILURES: Final = 9
"""In a row, over about three minutes: a router that restarts is outlasted."""
MAX_RETRY_AFTER_S: Final = 600.0
"""The longest pause that a server may ask for."""

_PROGRESS_BYTES: Final = 16 * PIECE_BYTES
"""After so many bytes, earlier failures no longer count."""
_STALL_S: Final = 20.0
_CONNECT_S: Final = 15.0
_POLL_S: Final = 0.2
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_BUSY: Final = frozenset({408, 425, 429})
_FIRST_SERVER_ERROR: Final = 500
_REFUSED: Final = frozenset({401, 403, 404, 410})
"""What a URL that was signed for some time answers once that time is over."""
_MAX_REFUSALS: Final = 2
"""In a row: new URLs have been refused, too."""


def is_passing(status: int) -> bool:
    """Return whether a server that answers so may give the file later; so may what stands before it."""
    return status in _BUSY or status >= _FIRST_SERVER_ERROR


class RetryLater(Exception):
    """A request failed in a way that passes. `pause_s`: what the server asked for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s

    @classmethod
    def from_headers(cls, reason: str, headers: Mapping[str, str]) -> "RetryLater":
        """Return the failure with the pause that the response's Retry-After header asks for, if it does."""
        pause = headers.get("Retry-After", "")
        return cls(reason, float(pause) if pause.isascii() and pause.isdigit() else 0.0)


class Location(NamedTuple):
    """Where a file can be read, perhaps for some time only."""

    url: str
    headers: dict[str, str]


def new_client() -> "httpx.Client":
    """Return an HTTP client that gives up stalled connections."""
    import httpx  # here and below, as only imports from a hub need it

    return httpx.Client(timeout=httpx.Timeout(_STALL_S, connect=_CONNECT_S), follow_redirects=True)


@dataclass(slots=True)
class Retries:
    """The failures in a row, and the pauses after them, of which `progress` is told and may raise to give up."""

    what: str
    progress: Progress
    limit: int = MAX_FAILURES
    _failures: int = 0
    _jitter: random.Random = field(default_factory=random.Random)

    def pause(self, fault: RetryLater) -> None:
        """Wait before the next try; raise SourceError after too many failures."""
        self._failures += 1
        if self._failures >= self.limit:
            raise SourceError(f"{self.what}: {fault} ({self._failures} tries): try again later") from None
        if fault.pause_s > MAX_RETRY_AFTER_S:
            minutes = round(fault.pause_s / 60)
            raise SourceError(f"{self.what}: {fault}; try again in {minutes} minutes") from None
        left_s = max(backoff_s(self._failures, BACKOFF_S, self._jitter), fault.pause_s)
        while left_s > 0:
            self.progress(f"waiting: {fault}", 0, 0)
            time.sleep(min(left_s, _POLL_S))
            left_s -= _POLL_S

    def forget(self) -> None:
        """Start counting again, after progress."""
        self._failures = 0


@dataclass(slots=True)
class HttpFile:
    """A file on a server. `locate` says where it can be read now, and raises RetryLater or ModelError."""

    name: str
    size_bytes: int
    locate: Callable[[], Location]
    client: "httpx.Client"
    progress: Progress = ignore_progress
    _location: Location | None = None
    _refusals: int = 0

    def stream(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield the bytes of a range; raise ModelError in the end when the server does not give them."""
        position, end = offset, offset + size
        if end > self.size_bytes:
            raise ValueError(f"{self.name} has {self.size_bytes} bytes, and not {end}")
        retries = Retries(f"cannot read {self.name}", self.progress)
        gained = 0
        while position < end:
            try:
                with closing(self._request(position, end)) as pieces:
                    for piece in pieces:
                        yield piece
                        position += len(piece)
                        gained += len(piece)
                        if gained >= _PROGRESS_BYTES:
                            retries.forget()
                            gained = 0
            except RetryLater as fault:
                retries.pause(fault)

    def _request(self, start: int, end: int) -> Generator[bytes]:
        """Yield what one request gives of a range."""
        import httpx

        if self._location is None:
            self._location = self.locate()
        url, headers = self._location
        host = urlsplit(url).netloc
        headers = {**headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with self.client.stream("GET", url, headers=headers) as response:
                self._check(response, start, host)
                left = end - start
                for piece in response.iter_raw(PIECE_BYTES):
                    yield piece[:left]
                    left -= len(piece)
                    if left < 0:  # a server that ignores ranges sends the rest of the file, too
                        return
                if not left:  # and the connection can be used again
                    return
        except httpx.TransportError as error:
            raise RetryLater(f"{host}: {one_line(error)}") from None
        except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
            raise ModelError(f"cannot read {self.name}: {host}: {error}") from None
        raise RetryLater(f"{host} ended the connection too early")

    def _check(self, response: "httpx.Response", start: int, host: str) -> None:
        """Raise unless the response has the bytes from `start` on.

        What no server of the file would answer comes from something before it, such as the login page of a network.
        """
        status = response.status_code
        if is_passing(status):
            raise RetryLater.from_headers(f"{host} answers {_status(response)}", response.headers)
        if status in _REFUSED and self._refusals < _MAX_REFUSALS:
            self._location = None  # `locate` knows what is wrong, or another URL
            self._refusals += 1
            raise RetryLater(f"{host} answers {_status(response)}")
        self._refusals = 0
        if status in _REFUSED:
            raise ModelError(f"cannot read {self.name}: {host} answers a range request with {_status(response)}")
        if status == HTTPStatus.OK:
            length = response.headers.get("Content-Length", str(self.size_bytes))
            if length != str(self.size_bytes) or "html" in response.headers.get("Content-Type", ""):
                self._location = None  # a redirect to that page may have given it
                raise RetryLater(f"{host} answers with something else than the file: does the network ask for a login?")
            if start:
                raise ModelError(
                    f"{host} cannot send a part of {self.name} (it ignores HTTP ranges): download the whole repository "
                    "with `hf download`, and import its folder"
                )
            return
        stated = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if status != HTTPStatus.PARTIAL_CONTENT or stated is None or int(stated[1]) != start:
            raise RetryLater(f"{host} answers a range request with {_status(response)}")
        if stated[3] not in {"*", str(self.size_bytes)}:
            raise ModelError(f"{host} has another file as {self.name}: of {stated[3]} bytes, not {self.size_bytes}")


def _status(response: "httpx.Response") -> str:
    return f"HTTP {response.status_code} {response.reason_phrase}".strip()
