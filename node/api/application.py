"""The HTTP application: its routes and error handlers."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from node.api.access import Access
from node.api.anthropic.models import error_path
from node.api.anthropic.requests import parse_message_request
from node.api.bench import BenchEndpoint
from node.api.embeddings import EmbeddingEndpoint, ParseEmbedding
from node.api.endpoint import GenerationEndpoint, Parse
from node.api.errors import ApiError
from node.api.events import EventsEndpoint
from node.api.guard import Guard
from node.api.interface import NodeView
from node.api.measured import Measured
from node.api.metrics import MetricsPage
from node.api.ollama.embeddings import parse_embed, parse_embeddings
from node.api.ollama.requests import parse_chat, parse_generate
from node.api.openai.embeddings import parse_embedding_request
from node.api.openai.requests import parse_chat_request, parse_completion_request
from node.api.openai.responses import parse_response_request
from node.api.openapi.document import describe_api
from node.api.page_files import PageFiles
from node.api.pages import Pages
from node.api.request_id import RequestIds
from node.coordinator.submission import JobError


def make_app(node: NodeView, access: Access) -> ASGIApp:
    """Return the ASGI application of a node. With API keys, all but health and the page's files require one."""
    protocols: dict[str, Parse] = {
        "/v1/chat/completions": parse_chat_request,
        "/v1/completions": parse_completion_request,
        "/v1/responses": parse_response_request,
        "/v1/messages": parse_message_request,
        "/api/chat": parse_chat,
        "/api/generate": parse_generate,
    }
    embeddings: dict[str, ParseEmbedding] = {
        "/v1/embeddings": parse_embedding_request,
        "/api/embed": parse_embed,
        "/api/embeddings": parse_embeddings,
    }
    routes = [
        *(
            Route(path, GenerationEndpoint(node.submitter, parse), methods=["POST"])
            for path, parse in protocols.items()
        ),
        *(
            Route(path, EmbeddingEndpoint(node.submitter, parse), methods=["POST"])
            for path, parse in embeddings.items()
        ),
        *Pages(node).routes(),
        *PageFiles().routes(),
        Route("/swarm/events", EventsEndpoint(node), methods=["GET"]),
        *MetricsPage(node, node.telemetry.metrics).routes(),
        Route("/swarm/bench", BenchEndpoint(node.bench), methods=["POST"]),
    ]
    routes.append(_description(routes))
    handlers: dict[Any, Any] = {
        ApiError: _on_api_error,
        JobError: _on_job_error,
        HTTPException: _on_http_exception,
        Exception: _on_defect,
    }
    guarded = Guard(Starlette(routes=routes, exception_handlers=handlers), access)
    return RequestIds(Measured(guarded, routes, node.telemetry))


def _description(routes: Sequence[Route]) -> Route:
    """Return the route of the OpenAPI description of all routes, itself included."""

    @cache
    def document() -> JSONResponse:
        return JSONResponse(describe_api(routes))

    async def openapi(_: Request) -> JSONResponse:
        return document()

    return Route("/openapi.json", openapi, methods=["GET"])


async def _on_api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response(error_path(request.scope["path"], request.headers))


async def _on_job_error(request: Request, error: JobError) -> JSONResponse:
    return ApiError.from_job_error(error).response(request.scope["path"])


async def _on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    path: str = request.scope["path"]
    message = f"{request.method} {path}: {error.detail.lower()}"
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, headers=headers).response(error_path(path, request.headers))


async def _on_defect(request: Request, _: Exception) -> JSONResponse:
    # The server logs the exception; clients must not see it.
    return ApiError(500, "internal error: see the log of the node").response(request.scope["path"])
