"""API keys: who asks, how often, and how many answers at a time.

Only hashes of keys are held. A key has 256 random bits, so that a plain hash cannot be guessed.
"""

import hmac
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import trio
from starlette.types import Scope

from node.api.errors import ApiError
from node.config import ApiKey, hash_api_key
from node.util.token_bucket import TokenBucket

MAX_READERS: Final = 4
"""Readers of events with one key."""
BUSY_RETRY_S: Final = 1
"""When a client should retry that has as many answers under way as its key admits."""


@dataclass(slots=True)
class KeyUse:
    """What one key has used."""

    key: ApiKey
    bucket: TokenBucket | None
    running: int = 0
    readers: int = 0
    """Of events."""
    is_revoked: bool = False
    """Whether the key was revoked: its requests under way may end."""

    def begin(self, answers: int, counted: int = 0, param: str = "n", requests: int = 0) -> dict[str, str]:
        """Count the answers of a request; return the headers that tell what is left. Raises ApiError.

        A request that has to wait for other answers to end is no request of this minute: its client is told to retry
        every second, and would use the minute up in waiting.

        `counted`: those of them that are counted already. `param`: the field that says how many they are. `requests`:
        of the minute, where a measurement runs more jobs, one after another.
        """
        concurrency, per_minute = self.key.concurrency, self.key.requests_per_minute
        requests = max(answers, requests)
        most = min(concurrency or answers, per_minute or answers)
        if answers > most:
            message = f"the request wants {answers} answers; the API key {self.key.name!r} admits {most}: ask for fewer"
            raise ApiError(400, message, param=param)
        if per_minute is not None and requests > per_minute:
            name = self.key.name
            message = (
                f"the measurement runs {requests} jobs; the API key {name!r} admits {per_minute} a minute: name fewer "
                "methods or rounds"
            )
            raise ApiError(400, message, param="methods")
        if concurrency is not None and self.running + answers - counted > concurrency:
            if self.bucket is not None:
                self.bucket.give_back(counted, trio.current_time())
            message = f"the API key {self.key.name!r} admits {concurrency} answers at a time: wait for one to end"
            headers = self._rate_headers() | {"Retry-After": str(BUSY_RETRY_S)}
            raise ApiError(429, message, code="too_many_requests", headers=headers)
        headers = {}
        if self.bucket is not None and per_minute is not None:
            now_s = trio.current_time()
            admitted = self.bucket.take(requests - counted, now_s)
            headers = self._rate_headers()
            if not admitted:
                left = self.bucket.level(now_s)
                retry_s = math.ceil((requests - left) * 60 / per_minute)
                message = f"the API key {self.key.name!r} admits {per_minute} requests a minute: retry in {retry_s} s"
                headers["Retry-After"] = str(max(1, retry_s))
                raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        self.running += answers - counted
        return headers

    def _rate_headers(self) -> dict[str, str]:
        """Return what tells a client how many requests of this minute are left."""
        per_minute = self.key.requests_per_minute
        if self.bucket is None or per_minute is None:
            return {}
        left = self.bucket.level(trio.current_time())
        return {
            "X-RateLimit-Limit-Requests": str(per_minute),
            "X-RateLimit-Remaining-Requests": str(math.floor(left)),
            "X-RateLimit-Reset-Requests": f"{(per_minute - left) * 60 / per_minute:.0f}s",
        }

    def begin_reading(self) -> None:
        """Count a reader of events. Raises ApiError."""
        if self.readers >= MAX_READERS:
            message = f"{MAX_READERS} clients with the API key {self.key.name!r} read the events already: close a page"
            raise ApiError(503, message, code="too_many_subscribers", headers={"Retry-After": "5"})
        self.readers += 1

    def end(self, answers: int, readers: int) -> None:
        """Count the end of answers, and of readers of events."""
        self.running -= answers
        self.readers -= readers


class RequestUse:
    """What one request uses of its key, as far as it is known: how many answers it wants is in its body."""

    def __init__(self, use: KeyUse | None) -> None:
        self._use = use
        self._running = 0
        self._readers = 0
        self.headers: dict[str, str] = {}
        """Of the answer."""

    def begin(self, answers: int, param: str = "n", requests: int = 0) -> None:
        """Count a request's answers, those that are counted already included. Raises ApiError where there is no room.

        A request refused for its rate counts as what was counted of it before: Retry-After tells when all of it fits.
        """
        answers = max(answers, self._running)
        if self._use is not None:
            try:
                self.headers |= self._use.begin(answers, self._running, param, requests)
            except ApiError as error:
                self.headers |= error.headers or {}
                raise
            self._running = answers

    @property
    def key_sha256(self) -> str:
        """The hash of the key; empty without one."""
        return "" if self._use is None else self._use.key.sha256

    @property
    def is_revoked(self) -> bool:
        """Whether the key was revoked since the request began."""
        return self._use is not None and self._use.is_revoked

    def begin_reading(self) -> None:
        """Count a reader of events. Raises ApiError where the key has too many."""
        if self._use is not None:
            self._use.begin_reading()
            self._readers += 1

    def end(self) -> None:
        """Count the end of the request."""
        if self._use is not None:
            self._use.end(self._running, self._readers)


_IN_SCOPE: Final = "metaswarm.use"
_RELEASE_BODY: Final = "metaswarm.release_body"


def with_use(scope: Scope, use: RequestUse, release_body: Callable[[], None]) -> Scope:
    """Return the scope of a request whose application counts what it uses, and tells when its body is parsed."""
    return {**scope, _IN_SCOPE: use, _RELEASE_BODY: release_body}


def release_body(scope: Scope) -> None:
    """Count the body of a request as no longer in memory: it is parsed, and its answer may take minutes."""
    if (release := scope.get(_RELEASE_BODY)) is not None:
        release()


def begin_answers(scope: Scope, answers: int = 1, param: str = "n", requests: int = 0) -> None:
    """Count the answers that a request wants at a time against its key; each job is one. Raises ApiError.

    `requests`: of the minute, where a measurement runs more jobs, one after another.
    """
    use = scope.get(_IN_SCOPE)
    if isinstance(use, RequestUse):
        use.begin(answers, param, requests)


def key_sha256_of(scope: Scope) -> str:
    """Return the hash of the API key that a request came with; empty without one."""
    use = scope.get(_IN_SCOPE)
    return use.key_sha256 if isinstance(use, RequestUse) else ""


def begin_reading(scope: Scope) -> Callable[[], bool]:
    """Count a stream of events against its key, apart from answers, of which a page must be able to have all.

    Returns what tells whether it may go on, as such a stream never ends by itself. Raises ApiError.
    """
    use = scope.get(_IN_SCOPE)
    if not isinstance(use, RequestUse):
        return lambda: True
    use.begin_reading()
    return lambda: not use.is_revoked


class KeyRing:
    """The keys of a node, and their use."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._uses: Mapping[str, KeyUse] = {}
        self.replace(keys)

    def __len__(self) -> int:
        return len(self._uses)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Take these keys in place of the former ones. What is under way with one counts against its new limits."""
        uses: dict[str, KeyUse] = {}
        for key in keys:
            use = uses[key.sha256] = self._uses.get(key.sha256) or KeyUse(key, None)
            if use.key.requests_per_minute != key.requests_per_minute:
                use.bucket = None
            use.key = key
        for sha256, use in self._uses.items():
            use.is_revoked = sha256 not in uses
        self._uses = uses

    def find(self, presented: str) -> KeyUse | None:
        """Return the use of a key; None if it is unknown. Takes as long for any."""
        digest = hash_api_key(presented)
        found: KeyUse | None = None
        for known, use in self._uses.items():
            if hmac.compare_digest(known, digest):
                found = use
        if found is not None and found.bucket is None and found.key.requests_per_minute is not None:
            per_minute = found.key.requests_per_minute
            found.bucket = TokenBucket(per_minute / 60, per_minute, trio.current_time())
        return found


class Access:
    """Who may use the API: without keys this machine alone. `cors_origins`: further origins of pages; `*` for any."""

    def __init__(self, *, keys: Iterable[ApiKey] = (), cors_origins: Iterable[str] = ()) -> None:
        self.keys = KeyRing(keys)
        self.cors_origins = frozenset(cors_origins)
