"""What each route takes and answers. A route without an entry here is a defect that a test finds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from node.api.anthropic.requests import COUNT_REQUEST, MESSAGE_REQUEST
from node.api.bench import BENCH
from node.api.explanation import TASK
from node.api.fields import ObjectForm
from node.api.interface import (
    Explanation,
    JobDocument,
    JoinDocument,
    LearningDocument,
    ModelDocument,
    NodeStatus,
    PeerStatus,
)
from node.api.ollama.embeddings import EMBED, EMBEDDINGS
from node.api.ollama.requests import CHAT as OLLAMA_CHAT
from node.api.ollama.requests import GENERATE, PULL, SHOW
from node.api.openai.embeddings import EMBEDDING
from node.api.openai.requests import CHAT, COMPLETION
from node.api.openai.responses import RESPONSE
from node.api.openapi import answers

EVENTS: Final = "text/event-stream"
JSON_LINES: Final = "application/x-ndjson"

_EITHER: Final = "; as the Anthropic API does, errors included, where the header anthropic-version is set"
_JOB_STATUSES: Final = (404, 429, 502, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route. `answer`: a JSON Schema, or a type of which one is made; None where `media_type` is no JSON.

    `is_refused`: it answers every request with an error that says what to do instead. `stream`: the media type of
    a streamed answer. `statuses`: beside 200 and those of every route.
    """

    summary: str
    tag: str
    body: ObjectForm | None = None
    answer: Any = None
    media_type: str = "application/json"
    stream: str | None = None
    statuses: tuple[int, ...] = ()
    is_public: bool = False
    is_refused: bool = False


def _generates(tag: str, summary: str, body: ObjectForm, answer: Any, stream: str | None = EVENTS) -> Operation:
    return Operation(summary=summary, tag=tag, body=body, answer=answer, stream=stream, statuses=_JOB_STATUSES)


def _refused(what: str, body: ObjectForm | None = None) -> Operation:
    summary = f"{what}: not done here, and the error says what to do instead"
    return Operation(summary=summary, tag="Ollama", body=body, statuses=(400,), is_refused=True)


OPERATIONS: Final[Mapping[str, Operation]] = {
    "POST /v1/chat/completions": _generates("OpenAI", "Continue a conversation", CHAT, answers.CHAT_COMPLETION),
    "POST /v1/completions": _generates("OpenAI", "Continue texts", COMPLETION, answers.TEXT_COMPLETION),
    "POST /v1/responses": _generates("OpenAI", "Continue a conversation", RESPONSE, answers.RESPONSE),
    "POST /v1/embeddings": _generates("OpenAI", "Embed texts", EMBEDDING, answers.EMBEDDINGS, None),
    "GET /v1/models": Operation(
        summary=f"List the complete models{_EITHER}", tag="OpenAI", answer=answers.MODELS_OF_EITHER
    ),
    "GET /v1/models/{model}": Operation(
        summary=f"Describe a complete model{_EITHER}", tag="OpenAI", answer=answers.MODEL_OF_EITHER, statuses=(404,)
    ),
    "POST /v1/messages": _generates("Anthropic", "Continue a conversation", MESSAGE_REQUEST, answers.MESSAGE),
    "POST /v1/messages/count_tokens": _generates(
        "Anthropic", "Count the tokens of a conversation", COUNT_REQUEST, answers.TOKEN_COUNT, None
    ),
    "POST /api/chat": _generates(
        "Ollama", "Continue a conversation", OLLAMA_CHAT, answers.OLLAMA_CHAT, JSON_LINES
    ),
    "POST /api/generate": _generates("Ollama", "Answer a prompt", GENERATE, answers.OLLAMA_GENERATE, JSON_LINES),
    "POST /api/embed": _generates("Ollama", "Embed texts", EMBED, answers.OLLAMA_EMBED, None),
    "POST /api/embeddings": _generates("Ollama", "Embed a text", EMBEDDINGS, answers.OLLAMA_EMBEDDING, None),
    "GET /api/tags": Operation(summary="List the complete models", tag="Ollama", answer=answers.OLLAMA_TAGS),
    "GET /api/ps": Operation(
        summary="List the models of which this node serves blocks", tag="Ollama", answer=answers.OLLAMA_PS
    ),
    "POST /api/show": Operation(
        summary="Describe a model", tag="Ollama", body=SHOW, answer=answers.OLLAMA_SHOW, statuses=(404,)
    ),
    "POST /api/pull": Operation(
        summary="Whether a model is there; nothing is fetched", tag="Ollama", body=PULL, answer=answers.OLLAMA_PULL,
        stream=JSON_LINES, statuses=(404,),
    ),
    "POST /api/create": _refused("Make a model", SHOW),
    "POST /api/copy": _refused("Name a model", SHOW),
    "POST /api/push": _refused("Push a model", SHOW),
    "DELETE /api/delete": _refused("Delete a model"),
    "GET /api/version": Operation(
        summary="The versions of this API and of this program", tag="Ollama", answer=answers.OLLAMA_VERSION
    ),
    "GET /swarm/status": Operation(summary="This node", tag="Swarm", answer=NodeStatus),
    "GET /swarm/peers": Operation(summary="The known peers", tag="Swarm", answer={"peers": PeerStatus}),
    "GET /swarm/models": Operation(
        summary="The known models, block by block", tag="Swarm", answer={"models": ModelDocument}
    ),
    "POST /swarm/explain": Operation(
        summary="Let the stages vote on a task without running it", tag="Swarm", body=TASK, answer=Explanation,
        statuses=(404, 502),
    ),
    "POST /swarm/bench": Operation(
        summary="Measure methods by real jobs", tag="Swarm", body=BENCH, answer=answers.BENCH, statuses=(404, 502)
    ),
    "GET /swarm/jobs": Operation(summary="The recent jobs", tag="Swarm", answer={"jobs": JobDocument}),
    "GET /swarm/learning": Operation(
        summary="How the history grew, and how past choices turned out", tag="Swarm", answer=LearningDocument
    ),
    "GET /swarm/join": Operation(
        summary="The commands with which another node joins", tag="Swarm", answer=JoinDocument, statuses=(400,)
    ),
    "GET /swarm/events": Operation(
        summary="The documents above, again whenever they change", tag="Swarm", media_type=EVENTS
    ),
    "GET /health/live": Operation(
        summary="Whether the process answers", tag="Operation", answer=answers.HEALTH, is_public=True
    ),
    "GET /health/ready": Operation(
        summary="Whether every span is served and the swarm is joined; 503 with reasons", tag="Operation",
        answer=answers.HEALTH, is_public=True,
    ),
    "GET /health": Operation(
        summary="The same as /health/ready", tag="Operation", answer=answers.HEALTH, is_public=True
    ),
    "GET /metrics": Operation(summary="Metrics for Prometheus", tag="Operation", media_type="text/plain"),
    "GET /openapi.json": Operation(summary="This description", tag="Operation", answer={"type": "object"}),
    "GET /": Operation(summary="The page of this node", tag="Page", media_type="text/html", is_public=True),
    "GET /page/{file}": Operation(
        summary="A file of the page", tag="Page", media_type="*/*", statuses=(404,), is_public=True
    ),
}  # fmt: skip
