"""In front of the HTTP application: who may ask, and how much. Whoever is turned away is still heard to the end.

hypercorn's reader hands on a request part by part and waits for the application to take each; for an application
that answers without taking them all it would wait for ever, and the connection with it. So the whole body is read
here, within bounds, before the application sees the request.
"""

import hmac
from typing import Final
from urllib.parse import urlsplit

import trio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.api.errors import ApiError
from node.config import is_loopback

MAX_BODY_BYTES: Final = 8 << 20
BODY_TIMEOUT_S: Final = 30.0
DISCARD_TIMEOUT_S: Final = 5.0
"""How long an answer waits for the end of a body that nobody will read: most clients listen only after it."""


class Guard:
    """An ASGI application that passes on to another what may pass.

    A node without an API key trusts its own machine, but not every web page that is open in a browser there: such a
    page's requests carry a foreign Origin, or a foreign Host where the page's own name was pointed to this machine.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope["path"], Headers(scope=scope))
            body = await _read_body(receive)
        except ApiError as error:
            await _turn_away(error, scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _check(self, path: str, headers: Headers) -> None:
        if path == "/health":
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
        host, origin = headers.get("host"), headers.get("origin")
        if (host and not _is_local(f"//{host}")) or (origin and not _is_local(origin)):
            raise ApiError(403, "a node without an API key answers its own machine only", code="foreign_origin")


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
