"""A large body does not keep everybody else waiting."""

import json
import threading

import httpx
import pytest
import trio
import trio.testing
from starlette.datastructures import Headers
from starlette.types import Message

from node.api import fields, request_body
from node.api.request_body import parse_counted
from tests.unit.api.fakes import FakeNode, chat_body


async def test_large_body_is_parsed_beside_the_event_loop() -> None:
    goes_on = threading.Event()
    messages: list[Message] = [{"type": "http.request", "body": b"x" * (request_body.IN_THREAD_BYTES + 1)}]

    async def receive() -> Message:
        return messages.pop()

    def parse(body: bytes, _: Headers) -> int:
        assert goes_on.wait(5)
        return len(body)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_others_wait, goes_on)
        scope = {"type": "http", "headers": []}
        assert await parse_counted(scope, receive, parse) == request_body.IN_THREAD_BYTES + 1


async def _set_when_others_wait(event: threading.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    event.set()


async def test_large_body_is_answered_as_a_small_one(node: FakeNode, client: httpx.AsyncClient) -> None:
    text = "x" * request_body.IN_THREAD_BYTES
    response = await client.post("/v1/chat/completions", json=chat_body(messages=[{"role": "user", "content": text}]))
    assert response.status_code == 200
    assert (node.submitter.requests[0].messages or ())[0].content == text
    refused = await client.post("/v1/chat/completions", json=chat_body(message=text))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "message")


@pytest.mark.parametrize("value", ["[],", "1,", "{},"])
async def test_refuses_body_of_more_values_than_any_model_takes(
    node: FakeNode, client: httpx.AsyncClient, value: str
) -> None:
    body = '{"model": "tiny", "prompt": [' + value * (1 << 20) + "0]}"
    refused = await client.post("/v1/completions", content=body.encode())
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert node.submitter.requests == []


@pytest.mark.parametrize("text", ["a,[b]{c}," * 450, '\\",[{' * 600])
async def test_separators_in_texts_are_no_values(node: FakeNode, client: httpx.AsyncClient, text: str) -> None:
    texts = [text] * 1000
    assert sum(map(json.dumps(texts).count, ",[{")) > fields.MAX_VALUES
    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": texts}, timeout=60)
    assert answer.status_code == 200
    assert [job.prompt for job in node.submitter.requests] == texts


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"model": "tiny", "prompt": ["\\", '\\"', '"'] * 200_000 + [0] * 500_000}).encode(),
        json.dumps({"model": "tiny", "prompt": ["\u2200"] + [0] * (1 << 20)}, ensure_ascii=False).encode("utf-16-le"),
    ],
    ids=["escapes", "utf-16"],
)
async def test_no_text_hides_values(node: FakeNode, client: httpx.AsyncClient, body: bytes) -> None:
    refused = await client.post("/v1/completions", content=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert node.submitter.requests == []
