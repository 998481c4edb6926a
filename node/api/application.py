"""The HTTP application: which page answers what, and who may ask."""

import hmac
import time
from typing import Any, Final
from urllib.parse import urlsplit

import trio
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.api.completions import CompletionEndpoint
from node.api.errors import ApiError
from node.api.interface import ModelStatus, NodeView
from node.api.requests import parse_chat_request, parse_completion_request
from node.config import is_loopback

DRAIN_TIMEOUT_S: Final = 5.0


def make_app(node: NodeView, api_key: str | None) -> ASGIApp:
    """Return the ASGI application of a node. With an API key, every page but `/health` asks for it."""
    created_s = int(time.time())

    def list_models() -> list[dict[str, Any]]:
        return [_openai_model(model, created_s) for model in node.models() if model["complete"]]

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": list_models()})

    async def model(request: Request) -> JSONResponse:
        name = request.path_params["model"]
        for each in list_models():
            if each["id"] == name:
                return JSONResponse(each)
        raise ApiError(404, f"no complete model {name!r} in the swarm", param="model", code="model_not_found")

    async def health(_: Request) -> JSONResponse:
        state = node.status()["state"]
        if state == "serving":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": state}, 503)

    async def status(_: Request) -> JSONResponse:
        return JSONResponse(node.status())

    async def peers(_: Request) -> JSONResponse:
        return JSONResponse({"peers": node.peers()})

    async def swarm_models(_: Request) -> JSONResponse:
        return JSONResponse({"models": node.models()})

    chat_completions = CompletionEndpoint(node.submitter, parse_chat_request)
    completions = CompletionEndpoint(node.submitter, parse_completion_request)
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", model, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/swarm/status", status, methods=["GET"]),
        Route("/swarm/peers", peers, methods=["GET"]),
        Route("/swarm/models", swarm_models, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {ApiError: _on_api_error, HTTPException: _on_http_exception, Exception: _on_defect}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), api_key)


def _openai_model(model: ModelStatus, created_s: int) -> dict[str, Any]:
    return {
        "id": model["name"] or model["model"],
        "object": "model",
        "created": created_s,
        "owned_by": "metaswarm",
    }


async def _on_api_error(_: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def _on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, headers=headers).response()


async def _on_defect(_: Request, __: Exception) -> JSONResponse:
    # The server logs the exception; what it says is not for strangers.
    return ApiError(500, "the node made an error; its log tells more").response()


class _Guard:
    """Lets in whoever may ask, and reads to its end every request that was answered early.

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
        error = self._check(scope["path"], Headers(scope=scope))
        body = _TrackedBody(receive)
        if error is None:
            await self._app(scope, body.receive, send)
        else:
            await error.response()(scope, body.receive, send)
        await body.drain()

    def _check(self, path: str, headers: Headers) -> ApiError | None:
        if path == "/health":
            return None
        if self._api_key is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
                return None
            return ApiError(
                401,
                "this node asks for its API key: send the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        host, origin = headers.get("host"), headers.get("origin")
        if (host and not _is_local(f"//{host}")) or (origin and not _is_local(origin)):
            return ApiError(403, "a node without an API key answers its own machine only", code="foreign_origin")
        return None


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


class _TrackedBody:
    """Knows whether a request's body was read to its end.

    The server's reader waits for the application to take each part: it would wait for ever, and the connection with
    it, for an application that answers without reading.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = self._ended or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read what is left, for a bounded time."""
        with trio.move_on_after(DRAIN_TIMEOUT_S):
            while not self._ended:
                await self.receive()
