"""Ollama's endpoints that change which models there are: pulling one that is there, and what to do instead of the rest.

Clients pull a model before they use it. Which files a node has is decided on its machine, never by its API.
"""

from collections.abc import Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.api.errors import ApiError
from node.api.interface import ModelDocument
from node.api.ollama.answers import JSON_LINES
from node.util.json_line import json_line

_IMPORT: Final = "import it on the node's machine with `metaswarm model import {} --name NAME`"
INSTEAD: Final[Mapping[str, str]] = {
    "POST /api/create": f"a node makes no models by its API: {_IMPORT.format('SOURCE')}",
    "POST /api/copy": f"a node names no models by its API: {_IMPORT.format('SOURCE')}",
    "POST /api/push": "a node pushes no models: peers fetch those that it serves, see `metaswarm node --serve`",
    "DELETE /api/delete": "a node deletes no models by its API: use `metaswarm model remove MODEL` on its machine",
}
"""What the endpoints that do nothing say."""


def pulled(model: ModelDocument | None, name: str, *, streams: bool) -> Response:
    """Return the answer of `POST /api/pull`. Raises ApiError where the model is not complete in the swarm."""
    if model is None:
        message = (
            f"model {name!r} is not in the swarm, and a node pulls none by its API: import it with `metaswarm model "
            f"import {name}`, and serve it with `metaswarm node --serve {name}`"
        )
        raise ApiError(404, message, param="model", code="model_not_found")
    if not model["complete"]:
        missing = ", ".join(f"{start}-{end}" for start, end in model["uncovered"]) or "some"
        message = f"model {name!r} is incomplete in the swarm: no peer that is reached serves its blocks {missing}"
        raise ApiError(404, f"{message}; `metaswarm status` says how to serve them", param="model")
    done = {"status": "success"}
    if not streams:
        return JSONResponse(done)
    lines = [json_line(each) for each in ({"status": "pulling manifest"}, done)]
    return Response("".join(f"{line}\n" for line in lines), media_type=JSON_LINES)


def refusing_routes() -> list[Route]:
    """Return the routes that say what to do instead."""
    return [_refusing(name, instead) for name, instead in INSTEAD.items()]


def _refusing(name: str, instead: str) -> Route:
    method, path = name.split()

    async def refuse(_: Request) -> Response:
        raise ApiError(400, instead)

    return Route(path, refuse, methods=[method])
