"""What Ollama's endpoints tell of models: `/api/tags`, `/api/show`, `/api/version`."""

from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from node.api.errors import ApiError
from node.api.fields import parse_json
from node.api.interface import ModelDocument
from node.api.ollama.requests import SHOW, model_name
from node.coordinator.submission import ModelCapabilities


def describe_tags(models: Iterable[ModelDocument], since_s: int) -> dict[str, Any]:
    """Return the answer of `GET /api/tags`: the models that are complete in the swarm."""
    return {"models": [_entry(model, since_s) for model in models if model["complete"]]}


def shown_model(body: bytes, models: Iterable[ModelDocument]) -> ModelDocument:
    """Return the model that the body of `POST /api/show` names. Raises ApiError."""
    name = model_name(SHOW.read(parse_json(body)))
    for model in models:
        if name == model["name"] or (len(name) >= 8 and model["model"].startswith(name)):
            return model
    raise ApiError(404, f"model {name!r} not found", param="model", code="model_not_found")


def describe_model(model: ModelDocument, capabilities: ModelCapabilities | None, since_s: int) -> dict[str, Any]:
    """Return the answer of `POST /api/show`. `capabilities`: None if its tokenizer is unavailable."""
    entry, architecture = _entry(model, since_s), model["architecture"] or "unknown"
    chat = capabilities.chat_format if capabilities else None
    facts = {} if capabilities is None else {f"{architecture}.context_length": capabilities.max_positions}
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
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
    """Return the answer of `GET /api/version`."""
    try:
        return {"version": version("metaswarm")}
    except PackageNotFoundError:
        return {"version": "0"}


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
