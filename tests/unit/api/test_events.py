"""`/swarm/events`, and the documents that came with it."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, cast

import httpx
import trio
from starlette.types import Message

from node.api.events import MAX_SUBSCRIBERS, EventsEndpoint
from node.coordinator.job_log import JobState
from protocol.identity import JobId
from tests.unit.api.fakes import JOB, MODEL, FakeNode


@asynccontextmanager
async def reading(client: httpx.AsyncClient) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    async with client.stream("GET", "/swarm/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")

        async def events() -> AsyncGenerator[tuple[str, Any], None]:
            name = ""
            async with aclosing(cast("AsyncGenerator[str, None]", answer.aiter_lines())) as lines:
                async for line in lines:
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        yield name, json.loads(line.removeprefix("data: "))

        async with aclosing(events()) as found:
            yield found


async def test_events_begin_with_every_document_then_tell_what_changed(
    node: FakeNode, client: httpx.AsyncClient
) -> None:
    with trio.fail_after(10):
        async with reading(client) as events:
            first: dict[str, Any] = {}
            while len(first) < 5:
                name, document = await anext(events)
                first[name] = document
            assert first["status"] == node.status_document()
            assert first["jobs"] == {"jobs": []}
            job = node.log.begin(JOB, MODEL, "tiny", is_trial=False, prompt_tokens=5)
            name, document = await anext(events)
            assert (name, [each["state"] for each in document["jobs"]]) == ("jobs", ["opening"])
            node.log.progress(job, stages=(), method="baseline", tokens=3, replays=1)
            name, document = await anext(events)
            assert [(each["state"], each["tokens"], each["replays"]) for each in document["jobs"]] == [
                ("running", 3, 1)
            ]
            node.draining = True
            name, document = await anext(events)
            assert (name, document["state"]) == ("status", "draining")


async def test_events_end_when_node_stops(node: FakeNode, client: httpx.AsyncClient) -> None:
    with trio.fail_after(5):
        async with reading(client) as events:
            await anext(events)
            node.stopping.set()
            assert [name async for name, _ in events if name == "never"] == []


async def test_slow_subscriber_gets_only_latest_state() -> None:
    """While a client reads nothing, one message waits for it, however much happens."""
    node = FakeNode()
    sent: list[bytes] = []
    may_read, reads = trio.Event(), trio.Event()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            sent.append(message["body"])
            if len(sent) == 2:
                reads.set()
                await may_read.wait()

    async def receive() -> Message:
        await trio.sleep_forever()
        raise AssertionError

    job = node.log.begin(JOB, MODEL, "tiny", is_trial=False, prompt_tokens=5)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(EventsEndpoint(node), {"type": "http"}, receive, send)
            while not sent:
                await trio.sleep(0.01)
            node.log.progress(job, stages=(), method=None, tokens=1, replays=0)
            await reads.wait()
            for tokens in range(2, 500):
                node.log.progress(job, stages=(), method=None, tokens=tokens, replays=0)
            may_read.set()
            while len(sent) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert sent[2].count(b"event: jobs") == 1
    assert b'"tokens":499' in sent[2]


async def test_limits_subscribers(client: httpx.AsyncClient) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(MAX_SUBSCRIBERS):
            await stack.enter_async_context(client.stream("GET", "/swarm/events"))
        answer = await client.get("/swarm/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_subscribers")
        assert "Retry-After" in answer.headers
        assert (await client.get("/swarm/status")).status_code == 200


async def test_lists_jobs_without_texts(node: FakeNode, client: httpx.AsyncClient) -> None:
    failed = node.log.begin(JobId("cd" * 16), MODEL, "tiny", is_trial=True, prompt_tokens=5)
    node.log.end(failed, JobState.FAILED, "no peer serves blocks 3-4")
    (document,) = (await client.get("/swarm/jobs")).json()["jobs"]
    assert (document["state"], document["trial"], document["error"]) == ("failed", True, "no peer serves blocks 3-4")
    assert document["details"] is None


async def test_join_takes_what_the_new_node_serves(client: httpx.AsyncClient) -> None:
    assert (await client.get("/swarm/join")).json()["here"].endswith("--serve tiny")
    answer = await client.get("/swarm/join", params={"serve": "tiny:3-5"})
    assert answer.json()["here"].endswith("--serve tiny:3-5")
    for wrong in ("", "--help", "tiny:5-3", "tiny;rm", "x" * 300, "tiny:0-99999"):
        answer = await client.get("/swarm/join", params={"serve": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "serve"), wrong
