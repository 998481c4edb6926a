"""The connection to a node: its settings, its errors, and retries of what a node cannot take now."""

import os
import random
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from metaswarm_client.errors import (
    ApiError,
    InvalidRequestError,
    NodeUnreachableError,
    RateLimitError,
    SwarmError,
    UnavailableError,
    UnexpectedAnswerError,
)

DEFAULT_URL: Final = "http://127.0.0.1:8642"
CONNECT_TIMEOUT_S: Final = 5.0
TIMEOUTS: Final = {"/v1/embeddings": httpx.Timeout(600.0, connect=CONNECT_TIMEOUT_S)}
"""Of paths whose answers come whole, with no keep-alives before."""

MIN_DELAY_S: Final = 0.1
FIRST_BACKOFF_S: Final = 0.5
"""Doubles with each retry, where the answer has no Retry-After."""

JITTER: Final = 0.25
"""Part of a delay that is added at random, so that clients refused together do not return together."""


def client_settings(url: str | None, api_key: str | None, silence_timeout_s: float) -> dict[str, Any]:
    """Return the settings of an httpx client; URL and key may come from METASWARM_API and METASWARM_API_KEY."""
    url = url or os.environ.get("METASWARM_API") or DEFAULT_URL
    url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    host = urlsplit(url).hostname
    if not host or urlsplit(url).scheme not in {"http", "https"}:
        raise ValueError(f"expected the URL of a node's API such as {DEFAULT_URL}, not {url!r}")
    # Files that secrets are mounted from end in a newline.
    key = (api_key or os.environ.get("METASWARM_API_KEY") or "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("api_key or METASWARM_API_KEY: expected visible ASCII characters without spaces")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else None,
        "timeout": httpx.Timeout(silence_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
        "limits": httpx.Limits(max_connections=None),
        "trust_env": not (host in {"localhost", "::1"} or host.startswith("127.")),  # no proxy for loopback
    }


def build_request(
    http: httpx.Client | httpx.AsyncClient, method: str, path: str, body: Mapping[str, Any] | None
) -> httpx.Request:
    """Return a request. Raises InvalidRequestError for what JSON cannot say, such as NaN."""
    try:
        return http.build_request(method, path, json=body, timeout=TIMEOUTS.get(path, http.timeout))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request is not valid JSON: {error}") from None


def split_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a stream. httpx's own also end at U+2028 and the like, which JSON may have in texts."""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        yield from (line.removesuffix("\r") for line in lines)


async def split_lines_async(texts: AsyncIterable[str]) -> AsyncIterator[str]:
    """Yield the lines of a stream; see `split_lines`."""
    rest = ""
    async for text in texts:
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line.removesuffix("\r")


def json_of(response: httpx.Response) -> Any:
    """Return the JSON document of a response that was read. Raises UnexpectedAnswerError."""
    try:
        return response.json()
    except ValueError:
        raise UnexpectedAnswerError(f"{response.url} does not look like a metaswarm API") from None


@contextmanager
def transport_errors(url: str) -> Iterator[None]:
    """Raise httpx's errors as this client's."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout):
        message = f"no node answers at {url}: start one with `metaswarm node`, or name another URL (METASWARM_API)"
        raise NodeUnreachableError(message) from None
    except httpx.TimeoutException:
        raise NodeUnreachableError(f"the node at {url} does not answer any more") from None
    except httpx.LocalProtocolError:  # whose text may have the API key
        raise SwarmError(f"the request to {url} is not valid HTTP") from None
    except httpx.TransportError as error:
        raise NodeUnreachableError(f"the connection to the node at {url} was lost: {error}") from error


@dataclass(slots=True)
class Retries:
    """The retries of one request. `limit_s`: of all delays together."""

    limit_s: float
    waited_s: float = 0.0
    _backoff_s: float = field(default=FIRST_BACKOFF_S, init=False)

    def delay_s(self, error: ApiError) -> float:
        """Return how long to wait before the next try. Raises the error if it would be no use, or too late."""
        if not isinstance(error, RateLimitError | UnavailableError):
            raise error
        delay_s = error.retry_after_s
        if delay_s is None:
            delay_s, self._backoff_s = self._backoff_s, 2 * self._backoff_s
        # A node that says 0 is not asked without a pause.
        delay_s = max(delay_s, MIN_DELAY_S) * (1 + JITTER * random.random())
        if self.waited_s + delay_s > self.limit_s:
            raise error
        self.waited_s += delay_s
        return delay_s
