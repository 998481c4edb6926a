"""Access control in front of the HTTP application: API key, origin, content type, and size of bodies.

hypercorn's reader passes a request on part by part and waits until the application takes each; if an application
answers without taking them all, it blocks forever, and the connection with it. So the whole body is read here, within
limits, before the application sees the request, and also before a refusal.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import trio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.api.access import BUSY_RETRY_S, Access, KeyUse, RequestUse, with_use
from node.api.anthropic.models import error_path
from node.api.errors import ApiError
from node.api.page_files import is_page
from node.config import is_loopback

MAX_BODY_BYTES: Final = 8 << 20
MAX_ALL_BODY_BYTES: Final = 256 << 20
"""Of bodies that are read or parsed: as many clients as there may be, each with the largest body, fill the memory."""
KEY_SHARE: Final = 4
"""The bodies of one key, or of all clients without one, have this part of it at most: a key can hold them unfinished,
which no other limit of it counts, and everybody else would be refused."""
SMALL_BODY_BYTES: Final = 64 << 10
"""Bodies up to it are not counted: connections bound them, and who asks little is not refused for the others."""
MAX_KEYLESS_BODY_BYTES: Final = 4 << 10
"""The same where no key is needed, and so no body either: clients without a key could fill the memory."""

BODY_TIMEOUT_S: Final = 30.0
DISCARD_TIMEOUT_S: Final = 5.0
"""Longest wait of a refusal for the end of the body: most clients read the answer only after sending it."""

END_LIMIT_S: Final = 1.0
"""Longest time for the end of an answer once the client has disconnected."""

EXPOSED_HEADERS: Final = (
    "Retry-After, X-Request-Id, X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, X-RateLimit-Reset-Requests"
)
"""What scripts of a page may read of an answer."""

PUBLIC: Final = frozenset({"/health", "/health/live", "/health/ready"})
"""Public pages: no key, any origin."""

_FOREIGN_SITES: Final = frozenset({"cross-site", "same-site"})
_HEADER_NAMES: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}( ?, ?[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}){0,63}")
_PREFLIGHT_AGE_S: Final = 600

_ORIGIN: Final = re.compile(r"file://|[a-z][a-z0-9+.-]{0,30}://[A-Za-z0-9._:-]{1,200}")
"""What can be pasted into a shell of what `--cors-origin` takes."""
_MAX_SHOWN: Final = 256


class Guard:
    """ASGI middleware that refuses requests without access.

    A node without an API key trusts its own machine, but not the web pages open in a browser there: their requests
    carry a foreign Origin, a foreign Host (DNS rebinding), or a foreign Sec-Fetch-Site.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._keys = access.keys
        self._origins = access.cors_origins
        self._bodies = BodyMemory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = plain_path(scope["path"])  # here, so that what is checked is what is routed and reported
        receive, send = _until_ended(receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin and self._is_admitted(origin):
            send = _with_headers(send, _cors_headers(origin))
        preflight = self._preflight(scope["method"], headers)
        is_keyless = preflight is not None or _is_public(scope["path"])
        use = RequestUse(None)
        reader = BodyReader(self._bodies)
        try:
            try:
                if preflight is None:
                    use = RequestUse(self._check(scope["path"], headers))
                    send = _with_headers(send, use.headers)
                    _check_form(scope["method"], scope["path"], headers)
                most_bytes = MAX_KEYLESS_BODY_BYTES if is_keyless else MAX_BODY_BYTES
                receive_again = await reader.read(receive, most_bytes, use.key_sha256)
            except ApiError as error:
                reader.release()
                await _refuse(error, scope, receive, send)
                return
            if preflight is not None:
                await preflight(scope, receive, send)
            elif receive_again is not None:
                await self._app(with_use(scope, use, reader.release), receive_again, send)
        finally:
            use.end()
            reader.release()

    def _is_admitted(self, origin: str) -> bool:
        """Return whether pages of an origin may use the API."""
        return _is_local(origin) or origin in self._origins or "*" in self._origins

    def _check(self, path: str, headers: Headers) -> KeyUse | None:
        """Return the use of the key that a request has, if keys are needed. Raises ApiError."""
        if _is_public(path):
            return None
        if self._keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            use = self._keys.find(key.strip()) if scheme.lower() == "bearer" else None
            # Clients of the Anthropic API send a header of their own, some of them both.
            use = use or self._keys.find(headers.get("x-api-key", "").strip())
            if use is None:
                raise ApiError(
                    401,
                    "API key missing or wrong: send the header `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            return use
        host, origin, site = (headers.get(name) for name in ("host", "origin", "sec-fetch-site"))
        if host and not _is_local(f"//{host}"):
            raise _foreign(f"{host[:_MAX_SHOWN]!a} is not its name: set an API key (`--api-key`, `--api-keys`)")
        if origin and not self._is_admitted(origin):
            raise _foreign(f"{origin[:_MAX_SHOWN]!a} is another origin: {_origin_remedy(origin)}")
        if not origin and site in _FOREIGN_SITES:
            message = "a node without an API key serves no pages of other sites; open this page by its address"
            raise ApiError(403, message, code="foreign_origin")
        return None

    def _preflight(self, method: str, headers: Headers) -> Response | None:
        """Return the answer to a CORS preflight from an admitted page, which carries no API key; else None."""
        origin, wanted = headers.get("origin"), headers.get("access-control-request-method")
        if method != "OPTIONS" or not origin or not wanted or not self._is_admitted(origin):
            return None
        allowed = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Max-Age": str(_PREFLIGHT_AGE_S),
        }
        names = headers.get("access-control-request-headers", "")
        if _HEADER_NAMES.fullmatch(names):
            allowed["Access-Control-Allow-Headers"] = names
        return Response(status_code=204, headers=allowed)


def plain_path(path: str) -> str:
    """Return a path as the routes have it: a base URL that ends with a slash puts two at the beginning."""
    return f"/{'/'.join(part for part in path.split('/') if part)}"


def _foreign(why: str) -> ApiError:
    return ApiError(403, f"a node without an API key serves its own machine only, and {why}", code="foreign_origin")


def _origin_remedy(origin: str) -> str:
    """Return how a node's owner admits an origin. `null` is that of every sandboxed frame, and so of any site."""
    if _ORIGIN.fullmatch(origin):
        return f"to admit its pages, start the node with `--cors-origin {origin}`"
    return "start the node with an API key and `--cors-origin '*'`, or serve the page by HTTP from this machine"


def _is_public(path: str) -> bool:
    return path in PUBLIC or is_page(path)


def _check_form(method: str, path: str, headers: Headers) -> None:
    """Refuse cross-site requests that need no preflight, such as forms; other clients may omit the content type."""
    is_strict = path.startswith("/swarm/") or "origin" in headers or "sec-fetch-site" in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and is_strict and kind != "application/json":
        message = "the body must be JSON: send the header `Content-Type: application/json`"
        raise ApiError(415, message, code="unsupported_media_type")


def _cors_headers(origin: str) -> dict[str, str]:
    """Return the headers with which a page may read the answer."""
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED_HEADERS, "Vary": "Origin"}


def _with_headers(send: Send, added: Mapping[str, str]) -> Send:
    """Return a `send` that adds headers to the answer, those that are there when it starts."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in added.items():
                if name == "Vary":
                    headers.add_vary_header(value)
                else:
                    headers[name] = value
        await send(message)

    return send_with_headers


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


class BodyMemory:
    """The bytes of bodies in memory, by key; those of clients without a key are together, under an empty one."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    def hold(self, count: int, key: str) -> None:
        """Count bytes. Raises ApiError where all bodies, or those of the key, have too many; counts them, too."""
        self._held[key] += count
        share = max(MAX_ALL_BODY_BYTES // KEY_SHARE, MAX_BODY_BYTES)
        if self._held[key] > share:
            whose, most = "your other requests", share
        elif self._held.total() > MAX_ALL_BODY_BYTES:
            whose, most = "all requests", MAX_ALL_BODY_BYTES
        else:
            return
        message = f"the bodies of {whose} that are being read have {most} bytes with this one: try again"
        raise ApiError(503, message, code="too_many_bytes", headers={"Retry-After": str(BUSY_RETRY_S)})

    def release(self, count: int, key: str) -> None:
        """Count bytes as no longer in memory."""
        self._held[key] -= count
        if not self._held[key]:
            del self._held[key]


class BodyReader:
    """Reads the body of one request, which is counted until `release`."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._held = 0
        self._key = ""
        self._body = bytearray()

    async def read(self, receive: Receive, most_bytes: int, key: str) -> Receive | None:
        """Return a `receive` that yields the whole body; None if the client disconnected. Raises ApiError.

        That alone has the body: whoever takes it can drop it.
        """
        self._key = key
        with trio.move_on_after(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                self._body += message.get("body", b"")
                if len(self._body) > most_bytes:
                    raise ApiError(413, f"the body has more than {most_bytes} bytes", code="request_too_large")
                self._hold(len(self._body))
                if not message.get("more_body", False):
                    body, self._body = bytes(self._body), bytearray()
                    return _replay(body, receive)
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} seconds")

    def _hold(self, size: int) -> None:
        if size > SMALL_BODY_BYTES:
            added, self._held = size - self._held, size
            self._memory.hold(added, self._key)

    def release(self) -> None:
        """Drop what is read, and count it as no longer in memory."""
        self._body = bytearray()
        self._memory.release(self._held, self._key)
        self._held = 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body in one message, then later messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _until_ended(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Return both so that a disconnect is reported only once the end of the answer is sent.

    hypercorn reports one at the end of every answer, before it closes the connection or makes it ready for the next
    request: an endpoint that is cancelled by it would leave the connection open for ever. The limit is for a client
    that is gone and cannot take the end.
    """
    is_ending = False
    ended = trio.Event()

    async def send_and_note(message: Message) -> None:
        nonlocal is_ending
        is_ending = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send(message)
        if is_ending:
            ended.set()

    async def receive_disconnect_late() -> Message:
        message = await receive()
        if is_ending and message["type"] == "http.disconnect":
            with trio.move_on_after(END_LIMIT_S):
                await ended.wait()
        return message

    return receive_disconnect_late, send_and_note


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    ended = trio.Event()

    async def discard() -> None:
        while (await receive()).get("more_body", False):
            pass
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(discard)
        with trio.move_on_after(DISCARD_TIMEOUT_S):
            await ended.wait()
        await error.response(error_path(scope["path"], Headers(scope=scope)))(scope, receive, send)
        nursery.cancel_scope.cancel()
