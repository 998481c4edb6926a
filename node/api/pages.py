"""What a node tells of itself, its peers and models: every endpoint but those that generate text."""

import re
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.api.anthropic import models as anthropic
from node.api.anthropic.requests import parse_count_request
from node.api.endpoint import origin_of
from node.api.errors import ApiError
from node.api.explanation import parse_task
from node.api.interface import ModelDocument, NodeView
from node.api.model_lookup import find_model
from node.api.ollama.changes import pulled, refusing_routes
from node.api.ollama.models import describe_model, describe_running, describe_tags, describe_version, shown_model
from node.api.ollama.requests import parse_pull, shown_name
from node.api.request_body import parse_counted, parse_uncounted
from node.config import ServeSpec
from node.coordinator.submission import JobError
from protocol.identity import BlockRange

_SERVE: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/:-]{0,199}?)(?::(\d{1,5})-(\d{1,5}))?")


class Pages:
    """The pages of one node."""

    def __init__(self, node: NodeView) -> None:
        self._node = node
        self._created_s = int(time.time())

    def routes(self) -> list[Route]:
        """Return the routes of all pages."""
        pages = {
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
            "/api/tags": self.tags,
            "/api/ps": self.running,
            "/api/version": self.version,
            "/health": self.ready,
            "/health/live": self.live,
            "/health/ready": self.ready,
            "/swarm/status": self.status,
            "/swarm/peers": self.peers,
            "/swarm/models": self.swarm_models,
            "/swarm/jobs": self.jobs,
            "/swarm/learning": self.learning,
            "/swarm/join": self.join,
        }
        return [
            *(Route(path, page, methods=["GET"]) for path, page in pages.items()),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/pull", self.pull, methods=["POST"]),
            *refusing_routes(),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route("/swarm/explain", self.explain, methods=["POST"]),
        ]

    def _complete_models(self) -> list[ModelDocument]:
        return [model for model in self._node.models() if model["complete"]]

    def _describe(self, model: ModelDocument) -> dict[str, Any]:
        return {
            "id": model["name"] or model["model"],
            "object": "model",
            "created": self._created_s,
            "owned_by": "metaswarm",
            "max_model_len": model["max_positions"],
        }

    async def models(self, request: Request) -> JSONResponse:
        """List the complete models, as the OpenAI API does, and for clients of the Anthropic API as that does."""
        if anthropic.is_anthropic(request.scope["path"], request.headers):
            return JSONResponse(anthropic.describe_models(self._complete_models(), self._created_s))
        return JSONResponse({"object": "list", "data": [self._describe(each) for each in self._complete_models()]})

    async def model(self, request: Request) -> JSONResponse:
        """Describe one of them, by its name or id."""
        name = request.path_params["model"]
        if (model := find_model(name, self._complete_models())) is not None:
            is_anthropic = anthropic.is_anthropic(request.scope["path"], request.headers)
            described = anthropic.describe_model(model, self._created_s) if is_anthropic else self._describe(model)
            return JSONResponse(described)
        raise ApiError(404, f"no complete model {name!r} in the swarm", param="model", code="model_not_found")

    async def tags(self, _: Request) -> JSONResponse:
        """List the complete models, as Ollama does."""
        return JSONResponse(describe_tags(self._node.models(), self._created_s))

    async def running(self, _: Request) -> JSONResponse:
        """List the models of which this node serves spans, as Ollama does."""
        spans = (await self._node.status())["spans"]
        return JSONResponse(describe_running(spans, self._node.models(), self._created_s))

    async def show(self, request: Request) -> JSONResponse:
        """Describe one of them."""
        name = await parse_uncounted(request.scope, request.receive, lambda body, _: shown_name(body))
        model = shown_model(name, self._node.models())
        capabilities = None
        with suppress(JobError):  # what is known of it without its tokenizer is an answer, too
            capabilities = await self._node.submitter.capabilities_of(model["model"])
        return JSONResponse(describe_model(model, capabilities, self._created_s))

    async def pull(self, request: Request) -> Response:
        """Say whether a model is there, as Ollama does once it has fetched it."""
        name, streams = await parse_uncounted(request.scope, request.receive, lambda body, _: parse_pull(body))
        return pulled(find_model(name, self._node.models()), name, streams=streams)

    async def count_tokens(self, request: Request) -> JSONResponse:
        """Return how many tokens a conversation has, as the Anthropic API does."""
        job = await parse_counted(request.scope, request.receive, lambda body, _: parse_count_request(body))
        job = replace(job, origin=origin_of(request.scope))
        return JSONResponse({"input_tokens": await self._node.submitter.count_tokens(job)})

    async def version(self, _: Request) -> JSONResponse:
        """Return the version of Ollama's API that is spoken, and of the program."""
        return JSONResponse(describe_version())

    async def live(self, _: Request) -> JSONResponse:
        """Return that the process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> JSONResponse:
        """Return whether every span is served and the swarm is joined, or why not."""
        # Anybody may ask: which disk of which folder is full is for those who may see the status.
        told = {"problems": ["see `metaswarm status`"]} if await self._node.problems() else {}
        if faults := self._node.faults():
            return JSONResponse({"status": "not ready", "reasons": faults} | told, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ok"} | told)

    async def status(self, _: Request) -> JSONResponse:
        """Return the status of the node."""
        return JSONResponse(await self._node.status())

    async def peers(self, _: Request) -> JSONResponse:
        """List the known peers."""
        return JSONResponse({"peers": self._node.peers()})

    async def swarm_models(self, _: Request) -> JSONResponse:
        """List the known models, block by block."""
        return JSONResponse({"models": self._node.models()})

    async def jobs(self, _: Request) -> JSONResponse:
        """List the recent jobs."""
        return JSONResponse({"jobs": self._node.jobs()[0]})

    async def learning(self, _: Request) -> JSONResponse:
        """Return how the history grew, and how past choices turned out."""
        return JSONResponse(self._node.learning())

    async def join(self, request: Request) -> JSONResponse:
        """Return the commands with which another node joins."""
        serve = request.query_params.get("serve")
        return JSONResponse(self._node.join(None if serve is None else _parse_serve(serve)))

    async def explain(self, request: Request) -> JSONResponse:
        """Let the stages vote on a described task."""
        task = await parse_counted(request.scope, request.receive, lambda body, _: parse_task(body))
        return JSONResponse(await self._node.explain(*task))


def _parse_serve(text: str) -> ServeSpec:
    match = _SERVE.fullmatch(text)
    if match is None:
        raise ApiError(400, f"serve: {text[:80]!r} is not valid, expected MODEL or MODEL:START-END", param="serve")
    name, start, end = match.groups()
    try:
        return ServeSpec(name, None if start is None else BlockRange(int(start), int(end)))
    except ValueError as error:
        raise ApiError(400, f"serve: {error}", param="serve") from None
