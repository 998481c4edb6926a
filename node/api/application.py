"""The HTTP application: its routes and error handlers."""

import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from node.api.bench import BenchEndpoint
from node.api.endpoint import GenerationEndpoint
from node.api.errors import ApiError
from node.api.explanation import parse_task
from node.api.guard import Guard
from node.api.interface import NodeView
from node.api.openai.requests import parse_chat_request, parse_completion_request
from node.api.request_id import RequestIds
from node.coordinator.submission import JobError


def make_app(node: NodeView, api_key: str | None) -> ASGIApp:
    """Return the ASGI application of a node. With an API key, every page but `/health` requires it."""
    created_s = int(time.time())

    def list_models() -> list[dict[str, Any]]:
        facts = {"object": "model", "created": created_s, "owned_by": "metaswarm"}
        return [{"id": model["name"] or model["model"], **facts} for model in node.models() if model["complete"]]

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": list_models()})

    async def model(request: Request) -> JSONResponse:
        name = request.path_params["model"]
        for each in list_models():
            if each["id"] == name:
                return JSONResponse(each)
        raise ApiError(404, f"no complete model {name!r} in the swarm", param="model", code="model_not_found")

    async def health(_: Request) -> JSONResponse:
        state = (await node.status())["state"]
        if state == "serving":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": state}, 503)

    async def status(_: Request) -> JSONResponse:
        return JSONResponse(await node.status())

    async def peers(_: Request) -> JSONResponse:
        return JSONResponse({"peers": node.peers()})

    async def swarm_models(_: Request) -> JSONResponse:
        return JSONResponse({"models": node.models()})

    async def explain(request: Request) -> JSONResponse:
        return JSONResponse(await node.explain(*parse_task(await request.body())))

    chat_completions = GenerationEndpoint(node.submitter, parse_chat_request)
    completions = GenerationEndpoint(node.submitter, parse_completion_request)
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", model, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/swarm/status", status, methods=["GET"]),
        Route("/swarm/peers", peers, methods=["GET"]),
        Route("/swarm/models", swarm_models, methods=["GET"]),
        Route("/swarm/bench", BenchEndpoint(node.bench), methods=["POST"]),
        Route("/swarm/explain", explain, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _on_api_error,
        JobError: _on_job_error,
        HTTPException: _on_http_exception,
        Exception: _on_defect,
    }
    return RequestIds(Guard(Starlette(routes=routes, exception_handlers=handlers), api_key))


async def _on_api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response(request.url.path)


async def _on_job_error(request: Request, error: JobError) -> JSONResponse:
    return ApiError.from_job_error(error).response(request.url.path)


async def _on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, headers=headers).response(request.url.path)


async def _on_defect(request: Request, _: Exception) -> JSONResponse:
    # The server logs the exception; clients must not see it.
    return ApiError(500, "internal error: see the log of the node").response(request.url.path)
