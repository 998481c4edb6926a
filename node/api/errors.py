"""Errors, each in the shape of the protocol that was asked.

The OpenAI API's is `{"error": {"message", "type", "param", "code"}}`, that of the Anthropic API `{"type": "error",
"error": {"type", "message"}}`, and that of Ollama `{"error": "message"}`.
"""

import math
from typing import Any

from starlette.responses import JSONResponse

from node.coordinator.submission import JobError, JobErrorCode

_JOB_ERROR_STATUS = {
    JobErrorCode.INVALID: 400,
    JobErrorCode.MODEL_NOT_FOUND: 404,
    JobErrorCode.CONTEXT_LENGTH: 400,
    JobErrorCode.OVER_BUDGET: 400,
    JobErrorCode.UNCOVERED: 503,
    JobErrorCode.FULL: 503,
    JobErrorCode.NOT_READY: 503,
    JobErrorCode.MEASURING: 503,
    JobErrorCode.FAILED: 502,
    JobErrorCode.LEAVING: 503,
}
_RETRY_AFTER_S = {
    JobErrorCode.UNCOVERED: 10.0,
    JobErrorCode.FULL: 2.0,
    JobErrorCode.NOT_READY: 10.0,
    JobErrorCode.MEASURING: 10.0,
    JobErrorCode.LEAVING: 10.0,
}
"""Default of Retry-After."""


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An error answer: status and one line. `param`: the field of the request at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @classmethod
    def from_job_error(cls, error: JobError) -> "ApiError":
        """Return the ApiError for a job's error."""
        status = _JOB_ERROR_STATUS[error.code]
        headers = None
        if status == 503:
            retry_after_s = error.retry_after_s if error.retry_after_s is not None else _RETRY_AFTER_S[error.code]
            headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
        param = "model" if error.code is JobErrorCode.MODEL_NOT_FOUND else error.param
        return cls(status, error.message, param=param, code=error.code.value, headers=headers)

    def document(self, path: str = "") -> dict[str, Any]:
        """Return the JSON document, in the shape of the protocol that has this path."""
        if path.startswith("/v1/messages"):
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        if path.startswith("/api/"):
            return {"error": self.message}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.document(path), self.status, headers=self.headers)
