"""The client tells what went wrong by the same class, whether the node said so by a status or in a stream."""

import json

import httpx
import pytest

from metaswarm_client.errors import error_in_stream, error_of
from node.api.errors import ApiError
from node.coordinator.submission import JobError, JobErrorCode


@pytest.mark.parametrize("code", JobErrorCode)
def test_error_in_a_stream_is_the_one_of_its_status(code: JobErrorCode) -> None:
    error = ApiError.from_job_error(JobError(code, "why"))
    document = json.loads(json.dumps(error.document()))
    request = httpx.Request("POST", "http://127.0.0.1:8642/v1/chat/completions")
    answered = error_of(httpx.Response(error.status, json=document, request=request))
    streamed = error_in_stream(document["error"], "r1")
    assert (type(streamed), streamed.code, str(streamed)) == (type(answered), code.value, "why")
    assert streamed.request_id == "r1"
