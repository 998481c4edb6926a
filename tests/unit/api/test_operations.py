"""What operators ask a node: health, metrics, and by which name a request is found again."""

from unittest.mock import AsyncMock

import httpx
import pytest

from node.coordinator.submission import JobError, JobErrorCode
from node.telemetry.trace_context import TraceContext
from tests.unit.api.fakes import FakeNode, chat_body, serve_node

TRACE_PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


async def test_ready_says_why_not(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.not_ready = ("tiny:0-4 is not served: being loaded",)
    for path in ("/health/ready", "/health"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["reasons"]) == (503, list(node.not_ready))
    assert (await client.get("/health/live")).status_code == 200
    node.not_ready = ()
    assert (await client.get("/health/ready")).json() == {"status": "ok"}


async def test_health_names_a_problem_that_leaves_the_node_ready(node: FakeNode, client: httpx.AsyncClient) -> None:
    node.has_problems = ("the disk of /data is full",)
    answer = await client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "problems": ["see `metaswarm status`"]})
    node.not_ready = ("the node is shutting down",)
    assert (await client.get("/health")).json()["problems"] == ["see `metaswarm status`"]


async def test_health_needs_no_key_and_metrics_do(node: FakeNode) -> None:
    async with serve_node(node, "sesame") as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/health/ready")).status_code == 200
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"Authorization": "Bearer sesame"})).status_code == 200


def samples(text: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def test_counts_requests_by_route_and_status(node: FakeNode, client: httpx.AsyncClient) -> None:
    for path in ("/v1/models/tiny", "/v1/models/none", "/nowhere/1", "/nowhere/2"):
        await client.get(path)
    node.submitter.refuse = JobError(JobErrorCode.FULL, "no room", retry_after_s=1)
    await client.post("/v1/chat/completions", json=chat_body())
    found = samples((await client.get("/metrics")).text)
    counted = {
        ('/v1/models/{model}', "GET", 200): 1,
        ('/v1/models/{model}', "GET", 404): 1,
        ("other", "GET", 404): 2,
        ("/v1/chat/completions", "POST", 503): 1,
    }  # fmt: skip
    for (route, method, status), count in counted.items():
        labels = f'method="{method}",route="{route}",status="{status}"'
        assert found[f"metaswarm_http_requests_total{{{labels}}}"] == count
    assert found['metaswarm_http_request_duration_seconds_count{route="other"}'] == 2


async def test_metrics_show_what_the_node_is_now(node: FakeNode, client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    expected = {
        "metaswarm_ready": 1,
        'metaswarm_blocks_served{model="tiny"}': 4,
        'metaswarm_kv_cache_positions{model="tiny"}': 4096,
        'metaswarm_kv_cache_reserved_positions{model="tiny"}': 64,
        'metaswarm_kv_cache_cached_positions{model="tiny"}': 32,
        'metaswarm_peers{state="connected"}': 1,
        'metaswarm_links{direction="out"}': 2,
        'metaswarm_network_bytes_total{direction="in"}': 6000,
        'metaswarm_uncovered_blocks{model="tiny"}': 0,
        'metaswarm_uncovered_blocks{model="other"}': 2,
    }
    assert {name: found[name] for name in expected} == expected
    openmetrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.text.endswith("# EOF\n")
    assert openmetrics.text.count("# EOF") == 1


async def test_model_that_lies_in_the_cache_lacks_no_blocks_unless_it_is_to_be_served(
    node: FakeNode, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, broken = node.models()
    cached = tiny | {"model": "ef" * 32, "name": "cached", "uncovered": [(0, 8)], "complete": False}
    partly = broken | {"name": "partly", "local": True}
    monkeypatch.setattr(node, "models", lambda: [tiny, partly, cached])
    for serve, count in ((["tiny:0-4"], 0), (["tiny:0-4", "cached:0-4"], 8), (["ef" * 4], 8)):
        status = await FakeNode().status() | {"serve": serve}
        monkeypatch.setattr(node, "status", AsyncMock(return_value=status))
        found = samples((await client.get("/metrics")).text)
        lacking = {
            name: found[f'metaswarm_uncovered_blocks{{model="{name}"}}'] for name in ("tiny", "partly", "cached")
        }
        assert lacking == {"tiny": 0, "partly": 2, "cached": count}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/api/chat"])
async def test_jobs_know_their_request(node: FakeNode, client: httpx.AsyncClient, path: str) -> None:
    body: dict[str, object] = {"model": "tiny", "prompt": "Hi"} if path == "/v1/completions" else chat_body()
    if path == "/v1/messages":
        body["max_tokens"] = 5
    headers = {"X-Request-Id": "mine-1", "traceparent": TRACE_PARENT}
    assert (await client.post(path, json=body, headers=headers)).status_code == 200
    origin = node.submitter.requests[-1].origin
    assert (origin.request_id, origin.endpoint, origin.trace_parent) == ("mine-1", path, TRACE_PARENT)
    await client.post(path, json=body, headers={"traceparent": "00-nonsense"})
    assert node.submitter.requests[-1].origin.trace_parent == ""


@pytest.mark.parametrize(
    "text", ["", "00", f"ff-{'ab' * 16}-{'cd' * 8}-01", f"00-{'0' * 32}-{'cd' * 8}-01", f"00-{'AB' * 16}-{'cd' * 8}-01"]
)
def test_refuses_invalid_traceparent(text: str) -> None:
    assert TraceContext.parse(text) is None


def test_span_below_keeps_trace_and_sampling() -> None:
    parent = TraceContext.parse(f"00-{'ab' * 16}-{'cd' * 8}-00")
    child = TraceContext.below(parent)
    assert (child.trace_id, child.is_sampled) == ("ab" * 16, False)
    assert child.span_id != "cd" * 8
    assert TraceContext.parse(str(child)) == child
