"""`/swarm/explain`: a task in a body becomes a job that is not run; what makes no sense is an error of one line."""

from typing import Any

import httpx
import pytest

from node.coordinator.submission import JobError, JobErrorCode
from protocol.measurements import Objective, QualityBound, TaskKind
from tests.unit.api.fakes import FakeNode, FakeSubmitter, serve_node


async def ask(node: FakeNode, task: dict[str, Any]) -> httpx.Response:
    async with serve_node(node) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        return await client.post("/swarm/explain", json=task)


async def test_explain_passes_task_to_node() -> None:
    node = FakeNode()
    task = {"model": "tiny", "prompt_tokens": 300, "max_tokens": 7, "concurrency": 4, "quality": "near"}
    task |= {"objective": "cost", "budget": 2.5}
    answer = await ask(node, {**task, "shared_prefix_share": 0.5})
    assert answer.status_code == 200
    assert answer.json()["agreed"]
    ((request, told),) = node.explained
    assert (request.model, len(request.prompt_tokens or ()), request.max_tokens) == ("tiny", 300, 7)
    assert (request.quality, request.objective, request.budget) == (QualityBound.NEAR, Objective.COST, 2.5)
    assert told == {"concurrency": 4, "shared_prefix_share": 0.5, "repetitiveness": 0.0}


@pytest.mark.parametrize(
    ("task", "kind", "max_tokens"),
    [
        ({}, TaskKind.GENERATE, 64),
        ({"task": "embed"}, TaskKind.EMBED, 0),
        ({"task": "score"}, TaskKind.SCORE, 0),
        ({"task": "score", "max_tokens": 1}, TaskKind.SCORE, 1),
    ],
)
async def test_explain_describes_each_kind_of_task(task: dict[str, Any], kind: TaskKind, max_tokens: int) -> None:
    node = FakeNode()
    assert (await ask(node, {"model": "tiny", **task})).status_code == 200
    ((request, _),) = node.explained
    assert (request.task_kind, request.max_tokens) == (kind, max_tokens)


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"model": "tiny", "task": "sing"},
        {"model": "tiny", "task": "embed", "max_tokens": 1},
        {"model": "tiny", "max_tokens": 0},
        {"model": "tiny", "prompt_tokens": 0},
        {"model": "tiny", "prompt_tokens": 99999999999999999999},
        {"model": "tiny", "max_tokens": -1},
        {"model": "tiny", "concurrency": "many"},
        {"model": "tiny", "repetitiveness": "nan"},
        {"model": "tiny", "shared_prefix_share": 1.1},
        {"model": "tiny", "quality": "good"},
        {"model": "tiny", "hurry": 1},
        {"model": "tiny", "objective": "speed"},
        {"model": "tiny", "budget": 0},
    ],
)
async def test_explain_refuses_invalid_task(task: dict[str, Any]) -> None:
    node = FakeNode()
    answer = await ask(node, task)
    assert answer.status_code == 400
    assert "\n" not in answer.json()["error"]["message"]
    assert not node.explained


async def test_explain_error_has_status_of_job_error() -> None:
    refuse = JobError(JobErrorCode.UNCOVERED, "no peer serves blocks 3-4 of tiny", retry_after_s=2.0)
    answer = await ask(FakeNode(FakeSubmitter(refuse=refuse)), {"model": "tiny"})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"


async def test_explain_refuses_get() -> None:
    node = FakeNode()
    async with serve_node(node) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        assert (await client.get("/swarm/explain", params={"model": "tiny"})).status_code == 405
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = await client.post("/swarm/explain", content=b'{"model": "tiny"}', headers=form)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert not node.explained
