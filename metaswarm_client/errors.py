"""What can go wrong. Every message is one line: what failed, and what to do."""

from typing import Any, Final

import httpx


class SwarmError(Exception):
    """Base of all errors of this client."""


class NodeUnreachableError(SwarmError):
    """No node answers at the URL, it has become silent, or the connection was lost."""


class UnexpectedAnswerError(SwarmError):
    """What answered is not a metaswarm API, or one of an incompatible release."""


class ApiError(SwarmError):
    """The node answered with an error.

    `status`: of HTTP; None for an error that ends a stream. `code` and `param`: what docs/http-api.md calls them.
    `retry_after_s`: when the node takes such a request again. `request_id`: names the request in the node's log.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id


class InvalidRequestError(ApiError):
    """The request is wrong (400, 413, 415): `param` names the field. Without a status: JSON cannot say it."""


class AccessDeniedError(ApiError):
    """The API key is missing or wrong, or the node answers its own machine only (401, 403)."""


class NotFoundError(ApiError):
    """No peer knows the model, its name is ambiguous, or this node has no such endpoint (404)."""


class RateLimitError(ApiError):
    """The API key's limit is reached (429)."""


class UnavailableError(ApiError):
    """The swarm cannot take the job now (503): `code` says whether blocks are not served, peers are full, …."""


class JobFailedError(ApiError):
    """A stage was lost and could not be replaced, or the node failed."""


_BY_STATUS: Final = {
    400: InvalidRequestError,
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: NotFoundError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    429: RateLimitError,
    503: UnavailableError,
}
_STATUS_OF_CODE: Final = {
    "blocks_not_served": 503,
    "peers_full": 503,
    "method_not_ready": 503,
    "quality_being_measured": 503,
    "node_leaving": 503,
    "model_not_found": 404,
    "context_length_exceeded": 400,
    "over_budget": 400,
    "invalid_request": 400,
}
"""For errors that end a stream, which have no status."""


def error_of(response: httpx.Response) -> ApiError:
    """Return the error that a response, which was read, tells."""
    try:
        error = response.json()["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, param = f"{response.url} answered {response.status_code} {response.reason_phrase}", None, None
    return _BY_STATUS.get(response.status_code, JobFailedError)(
        message,
        status=response.status_code,
        code=code,
        param=param,
        retry_after_s=_retry_after_s(response),
        request_id=response.headers.get("X-Request-Id"),
    )


def error_in_stream(error: Any, request_id: str | None = None) -> ApiError:
    """Return the error that ended a stream."""
    code = error.get("code")
    kind = _BY_STATUS.get(_STATUS_OF_CODE.get(code, 502), JobFailedError)
    return kind(str(error["message"]), code=code, param=error.get("param"), request_id=request_id)


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):  # a proxy may say a date
        return None
