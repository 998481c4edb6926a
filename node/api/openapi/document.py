"""Assembles the OpenAPI description of the routes that a node has."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, is_typeddict

from starlette.routing import BaseRoute, Route

from node.api.endpoint import DETAILS_HEADER
from node.api.ollama.models import program_version
from node.api.openapi import answers
from node.api.openapi.operations import OPERATIONS, Operation
from node.api.openapi.types import TypeSchemas

STATUSES: Final[Mapping[int, str]] = {
    400: "The request is not valid, or names what the model or the swarm does not do.",
    401: "The API key is missing or wrong.",
    403: "A node without an API key serves its own machine only.",
    404: "No peer knows the model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The header `Content-Type: application/json` is missing.",
    429: "A limit of the API key is reached: retry after `Retry-After`.",
    500: "A defect of the node, which has logged it.",
    502: "A stage was lost and could not be replaced.",
    503: "The swarm, or this node, cannot do it now: retry after `Retry-After`.",
}
_OF_EVERY_ROUTE: Final = (500, 503)
_OF_KEYS: Final = (401, 403)
_OF_BODIES: Final = (400, 408, 413, 415)

_ERRORS: Final[Mapping[str, Mapping[str, Any]]] = {"Anthropic": answers.ANTHROPIC_ERROR, "Ollama": answers.OLLAMA_ERROR}
"""By tag; those of all others have the form of the OpenAI API."""


def operation_names(routes: Iterable[BaseRoute]) -> list[str]:
    """Return `METHOD path` of each route, without HEAD."""
    return [
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
        if method != "HEAD"
    ]


def describe_api(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """Return the description of some routes, each of which must be among OPERATIONS."""
    types = TypeSchemas()
    paths: dict[str, dict[str, Any]] = {}
    for name in operation_names(routes):
        method, _, path = name.partition(" ")
        paths.setdefault(path, {})[method.lower()] = _describe(path, OPERATIONS[name], types)
    job = answers.job_schema(types)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "metaswarm",
            "version": program_version(),
            "description": "The APIs of OpenAI, Anthropic and Ollama, and what a node tells of itself.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": {**types.named, "Job": job},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _describe(path: str, operation: Operation, types: TypeSchemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": _parameters(path, operation),
        "responses": _responses(operation, types),
    }
    if operation.body is not None:
        content = {"application/json": {"schema": operation.body.schema}}
        described["requestBody"] = {"required": True, "content": content}
    # A node without keys takes requests of its own machine without one.
    described["security"] = [] if operation.is_public else [{"bearer": []}, {"key": []}, {}]
    return described


def _parameters(path: str, operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if "{model}" in path:
        described = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        parameters.append(described | {"description": "The name of a model, which may have slashes."})
    if "{file}" in path:
        parameters.append(
            {"name": "file", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        )
    if path == "/swarm/join":
        described = {"name": "serve", "in": "query", "schema": {"type": "string"}}
        parameters.append(described | {"description": "What the other node should serve: MODEL or MODEL:START-END."})
    if operation.body is not None and 429 in operation.statuses:
        described = {"name": DETAILS_HEADER, "in": "header", "schema": {"type": "string"}, "example": "1"}
        parameters.append(
            described | {"description": "The answer tells how the swarm did the job, unless it is 0, no or false."}
        )
    return parameters


def _responses(operation: Operation, types: TypeSchemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None or operation.media_type != "application/json":
        content[operation.media_type] = {"schema": _schema_of(operation.answer, types)}
    if operation.stream is not None:
        content[operation.stream] = {}  # a schema would be the whole stream's for some tools, each event's for others
    statuses = {
        *_OF_EVERY_ROUTE,
        *(() if operation.is_public else _OF_KEYS),
        *(_OF_BODIES if operation.body else ()),
        *operation.statuses,
    }
    done = {"200": {"description": operation.summary, "content": content}}
    responses: dict[str, Any] = {} if operation.is_refused else done
    error = _ERRORS.get(operation.tag, answers.OPENAI_ERROR)
    if operation.is_public:  # its own document says what is wrong
        error = {"anyOf": [error, {"type": "object"}]}
    for status in sorted(statuses):
        content = {"application/json": {"schema": error}}
        responses[str(status)] = {"description": STATUSES[status], "content": content}
    return responses


def _schema_of(answer: Any, types: TypeSchemas) -> Mapping[str, Any]:
    """Return the schema of an answer: given as one, as a type, or as the field of a list of a type."""
    if answer is None:
        return {"type": "string"}
    if is_typeddict(answer):
        return types.of(answer)
    if len(answer) == 1 and is_typeddict(next(iter(answer.values()))):
        [(field, kind)] = answer.items()
        return answers.record(**{field: answers.array(types.of(kind))})
    return dict(answer)
