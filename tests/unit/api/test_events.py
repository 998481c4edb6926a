"""`/swarm/events`, and the documents that came with it."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import trio
from starlette.types import Message

from node.api.events import MAX_SUBSCRIBERS, EventsEndpoint
from node.coordinator.recent_jobs import JobState
from protocol.identity import JobId
from tests.unit.api.fakes import JOB, MODEL, FakeNode


class Reader:
    """Reads events from a connection of its own, as HTTP/1.0, which has no chunks."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""

    async def next(self) -> tuple[str, Any] | None:
        """Return the name and the document of the next event; None at the end."""
        while True:
            while b"\n\n" not in self._received:
                data = await self._stream.receive_some()
                if not data:
                    return None
                self._received += data
            lines, _, self._received = self._received.partition(b"\n\n")
            if lines.startswith(b"event: "):
                name, document = lines.decode().removeprefix("event: ").split("\ndata: ")
                return name, json.loads(document)


@asynccontextmanager
async def reading(client: httpx.AsyncClient) -> AsyncIterator[Reader]:
    async with await trio.open_tcp_stream("127.0.0.1", client.base_url.port or 0) as stream:
        await stream.send_all(b"GET /swarm/events HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        yield Reader(stream)


async def test_events_begin_with_every_document_then_tell_what_changed(
    node: FakeNode, client: httpx.AsyncClient
) -> None:
    with trio.fail_after(10):
        async with reading(client) as events:
            first: dict[str, Any] = {}
            while len(first) < 5:
                name, document = await events.next() or ("ended", {})
                first[name] = document
            assert first["status"] == node.status_document()
            assert first["jobs"] == {"jobs": [], "running": []}
            job = node.recent_jobs.begin(JOB, MODEL, "tiny", is_trial=False, prompt_tokens=5)
            name, document = await events.next() or ("ended", {})
            assert (name, [each["state"] for each in document["jobs"]]) == ("jobs", ["opening"])
            node.recent_jobs.progress(job, stages=(), method="baseline", tokens=3, replays=1)
            name, document = await events.next() or ("ended", {})
            assert [(each["state"], each["tokens"], each["replays"]) for each in document["jobs"]] == [
                ("running", 3, 1)
            ]
            assert document["running"] == [JOB]
            node.recent_jobs.end(job, JobState.DONE)
            name, document = await events.next() or ("ended", {})
            assert ([each["state"] for each in document["jobs"]], document["running"]) == (["done"], [])
            node.draining = True
            name, document = await events.next() or ("ended", {})
            assert (name, document["state"]) == ("status", "draining")


async def test_events_end_when_node_stops(node: FakeNode, client: httpx.AsyncClient) -> None:
    with trio.fail_after(5):
        async with reading(client) as events:
            assert await events.next()
            node.stopping.set()
            while await events.next():
                pass


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

    job = node.recent_jobs.begin(JOB, MODEL, "tiny", is_trial=False, prompt_tokens=5)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(EventsEndpoint(node), {"type": "http"}, receive, send)
            while not sent:
                await trio.sleep(0.01)
            node.recent_jobs.progress(job, stages=(), method=None, tokens=1, replays=0)
            await reads.wait()
            for tokens in range(2, 500):
                node.recent_jobs.progress(job, stages=(), method=None, tokens=tokens, replays=0)
            may_read.set()
            while len(sent) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert sent[2].count(b"event: jobs") == 1
    assert b'"tokens":499' in sent[2]


async def test_limits_subscribers(client: httpx.AsyncClient) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(MAX_SUBSCRIBERS):
            assert await (await stack.enter_async_context(reading(client))).next()
        answer = await client.get("/swarm/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_subscribers")
        assert "Retry-After" in answer.headers
        assert (await client.get("/swarm/status")).status_code == 200


async def test_lists_jobs_without_texts(node: FakeNode, client: httpx.AsyncClient) -> None:
    failed = node.recent_jobs.begin(JobId("cd" * 16), MODEL, "tiny", is_trial=True, prompt_tokens=5)
    node.recent_jobs.end(failed, JobState.FAILED, "no peer serves blocks 3-4")
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
