"""In front of the HTTP application: who may ask, and how much. Whoever is turned away is still heard to the end.

hypercorn's reader hands on a request part by part and waits for the application to take each; for an application
that answers without taking them all it would wait for ever, and the connection with it. So the whole body is read
here, within bounds, before the application sees the request.
"""

import hmac
import re
from typing import Final
from urllib.parse import urlsplit

import trio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.api.errors import ApiError
from node.config import is_loopback

MAX_BODY_BYTES: Final = 8 << 20
BODY_TIMEOUT_S: Final = 30.0
DISCARD_TIMEOUT_S: Final = 5.0
"""How long an answer waits for the end of a body that nobody will read: most clients listen only after it."""

PUBLIC: Final = frozenset({"/health"})
"""Pages that anybody may read, without a key and from any web page."""

_FOREIGN_SITES: Final = frozenset({"cross-site", "same-site"})
_HEADER_NAMES: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}( ?, ?[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}){0,63}")
_PREFLIGHT_AGE_S: Final = 600


class Guard:
    """An ASGI application that passes on to another what may pass.

    A node without an API key trusts its own machine, but not every web page that is open in a browser there: such a
    page's requests carry a foreign Origin, or a foreign Host where the page's own name was pointed to this machine, or
    say that they come from another site.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin and _is_local(origin):
            send = _readable_by(origin, send)
        preflight = _preflight(scope["method"], headers)
        try:
            if preflight is None:
                self._check(scope["path"], headers)
                _check_form(scope["method"], scope["path"], headers)
            body = await _read_body(receive)
        except ApiError as error:
            await _turn_away(error, scope, receive, send)
        else:
            if preflight is not None:
                await preflight(scope, receive, send)
            elif body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _check(self, path: str, headers: Headers) -> None:
        if path in PUBLIC:
            return
        if self._api_key is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
                raise ApiError(
                    401,
                    "this node asks for its API key: send the header `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            return
        host, origin, site = (headers.get(name) for name in ("host", "origin", "sec-fetch-site"))
        if (host and not _is_local(f"//{host}")) or (origin and not _is_local(origin)):
            raise ApiError(403, "a node without an API key answers its own machine only", code="foreign_origin")
        if not origin and site in _FOREIGN_SITES:
            message = "a node without an API key answers no web page of another site; open this page by its address"
            raise ApiError(403, message, code="foreign_origin")


def _check_form(method: str, path: str, headers: Headers) -> None:
    """Refuse what a browser sends for any page without asking first, as forms do; other clients may omit the type."""
    is_strict = path.startswith("/swarm/") or "origin" in headers or "sec-fetch-site" in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and is_strict and kind != "application/json":
        message = "the body must be JSON: send the header `Content-Type: application/json`"
        raise ApiError(415, message, code="unsupported_media_type")


def _preflight(method: str, headers: Headers) -> Response | None:
    """Return the answer to a browser that asks whether a page of this machine may send a request.

    It asks without the API key, which the request itself then has to have. Nothing is said to other pages here.
    """
    origin, wanted = headers.get("origin"), headers.get("access-control-request-method")
    if method != "OPTIONS" or not origin or not wanted or not _is_local(origin):
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


def _readable_by(origin: str, send: Send) -> Send:
    """Return a `send` whose answer a page of this origin may read."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After"
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_headers


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body; None if the client went away before its end."""
    body = bytearray()
    with trio.move_on_after(BODY_TIMEOUT_S):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes", code="request_too_large")
            if not message.get("more_body", False):
                return bytes(body)
    raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} seconds")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one message, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


async def _turn_away(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    ended = trio.Event()

    async def discard() -> None:
        while (await receive()).get("more_body", False):
            pass
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(discard)
        with trio.move_on_after(DISCARD_TIMEOUT_S):
            await ended.wait()
        await error.response()(scope, receive, send)
        nursery.cancel_scope.cancel()
