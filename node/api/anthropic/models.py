"""The list of models in the shape of the Anthropic API, for its clients, which ask under the paths of OpenAI's."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from starlette.datastructures import Headers

from node.api.interface import ModelDocument

_VERSION: Final = "anthropic-version"


def error_path(path: str, headers: Headers) -> str:
    """Return a path of the API that a client speaks, which has the shape of its errors."""
    return "/v1/messages" if is_anthropic(path, headers) else path


def is_anthropic(path: str, headers: Headers) -> bool:
    """Return whether a request about models comes from a client of the Anthropic API."""
    return _VERSION in headers and (path == "/v1/models" or path.startswith("/v1/models/"))


def describe_model(model: ModelDocument, since_s: int) -> dict[str, Any]:
    """Return the answer of `GET /v1/models/{model}`."""
    name = model["name"] or model["model"]
    created_at = datetime.fromtimestamp(since_s, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": created_at}


def describe_models(models: Iterable[ModelDocument], since_s: int) -> dict[str, Any]:
    """Return the answer of `GET /v1/models`: all models, in one page."""
    data = [describe_model(model, since_s) for model in models]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": False, "first_id": first, "last_id": last}
