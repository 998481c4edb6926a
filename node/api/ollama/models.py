"""What Ollama's endpoints tell of models: `/api/tags`, `/api/ps`, `/api/show`, `/api/version`."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from node.api.errors import ApiError
from node.api.interface import ModelDocument, SpanDocument
from node.api.model_lookup import find_model
from node.coordinator.submission import ModelCapabilities

API_VERSION: Final = "0.14.0"
"""The version of Ollama whose API is spoken: clients compare it with the least that they work with.

Codex wants 0.13.4 at least, for the Responses API; the Anthropic API came with 0.14.
"""

_NEVER: Final = "2999-12-31T23:59:59Z"
"""When the model of a served span is unloaded."""


def describe_tags(models: Iterable[ModelDocument], since_s: int) -> dict[str, Any]:
    """Return the answer of `GET /api/tags`: the models that are complete in the swarm."""
    return {"models": [_entry(model, since_s) for model in models if model["complete"]]}


def shown_model(name: str, models: Sequence[ModelDocument]) -> ModelDocument:
    """Return the model of a name. Raises ApiError."""
    if (model := find_model(name, models)) is not None:
        return model
    raise ApiError(404, f"model {name!r} not found", param="model", code="model_not_found")


def describe_running(spans: Iterable[SpanDocument], models: Iterable[ModelDocument], since_s: int) -> dict[str, Any]:
    """Return the answer of `GET /api/ps`: the models of which this node serves spans, with the memory of those."""
    served = list(spans)
    return {"models": [_running(model, served, since_s) for model in models if _of(model, served)]}


def _of(model: ModelDocument, spans: Iterable[SpanDocument]) -> list[SpanDocument]:
    return [span for span in spans if span["model"] == model["model"]]


def _running(model: ModelDocument, spans: Iterable[SpanDocument], since_s: int) -> dict[str, Any]:
    entry, own = _entry(model, since_s), _of(model, spans)
    del entry["modified_at"]
    return entry | {
        "size": sum(span["weight_bytes"] for span in own),
        "size_vram": sum(span["weight_bytes"] for span in own if span["device"] != "cpu"),
        "context_length": model["max_positions"] or 0,
        "expires_at": _NEVER,
    }


def describe_model(model: ModelDocument, capabilities: ModelCapabilities | None, since_s: int) -> dict[str, Any]:
    """Return the answer of `POST /api/show`. `capabilities`: None if its tokenizer is unavailable."""
    entry, architecture = _entry(model, since_s), model["architecture"] or "unknown"
    chat = capabilities.chat_format if capabilities else None
    facts = {} if capabilities is None else {f"{architecture}.context_length": capabilities.max_positions}
    return {
        "modelfile": "",
        "parameters": "",
        "template": capabilities.chat_template if capabilities else "",
        "modified_at": entry["modified_at"],
        "details": entry["details"],
        "model_info": {
            "general.architecture": model["architecture"],
            "general.basename": model["name"],
            f"{architecture}.block_count": model["block_count"],
            **facts,
            "metaswarm.id": model["model"],
            "metaswarm.block_count": model["block_count"],
            "metaswarm.complete": model["complete"],
        },
        "capabilities": [
            "completion",
            "embedding",
            *(["tools"] if chat and chat.tools else []),
            *(["thinking"] if chat and chat.reasons else []),
        ],
    }


def describe_version() -> dict[str, str]:
    """Return the answer of `GET /api/version`: of the API, and of this program."""
    return {"version": API_VERSION, "metaswarm": program_version()}


def program_version() -> str:
    """Return the version of this program."""
    try:
        return version("metaswarm")
    except PackageNotFoundError:
        return "0"


def _entry(model: ModelDocument, since_s: int) -> dict[str, Any]:
    name, family = model["name"] or model["model"], model["architecture"] or ""
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(since_s, UTC).isoformat().replace("+00:00", "Z"),
        "size": model["size_bytes"] or 0,
        "digest": model["model"],
        "details": {
            "parent_model": "",
            "format": model["format"] or "",
            "family": family,
            "families": [family] if family else [],
            "parameter_size": "",
            "quantization_level": (model["weight_type"] or "").upper(),
        },
    }
