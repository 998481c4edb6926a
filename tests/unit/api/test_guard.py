from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from starlette.types import Message

from node.api import guard
from node.api.application import make_app
from tests.unit.api.fakes import FakeNode, chat_body, send_request, serve_node


@pytest.fixture
async def guarded_client(node: FakeNode) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_node(node, api_key="sesame") as url, httpx.AsyncClient(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    "authorization", [None, "sesame", "Bearer", "Bearer wrong", "Basic sesame", "Bearer s\u00e9same"]
)
async def test_without_the_api_key_nothing_is_told(
    node: FakeNode, guarded_client: httpx.AsyncClient, authorization: str | None
) -> None:
    headers = httpx.Headers([] if authorization is None else [(b"Authorization", authorization.encode())])
    for path in ("/swarm/status", "/v1/models", "/nowhere"):
        response = await guarded_client.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    response = await guarded_client.post("/v1/chat/completions", json=chat_body(), headers=headers)
    assert response.status_code == 401
    assert node.submitter.requests == []


async def test_with_the_api_key_everything_is(guarded_client: httpx.AsyncClient) -> None:
    headers = {"Authorization": "Bearer sesame", "Host": "swarm.example.org", "Origin": "https://chat.example.org"}
    assert (await guarded_client.get("/swarm/status", headers=headers)).status_code == 200
    assert (await guarded_client.get("/health")).status_code == 200


async def test_a_large_request_without_the_key_does_not_hold_its_connection(guarded_client: httpx.AsyncClient) -> None:
    with trio.fail_after(4):
        for _ in range(2):
            response = await guarded_client.post("/v1/completions", content=b"x" * (4 << 20))
            assert response.status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "attacker.example"},
        {"Host": "[::1"},
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
    ],
)
async def test_a_page_from_elsewhere_cannot_use_an_open_node(
    node: FakeNode, client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await client.post("/v1/chat/completions", json=chat_body(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "foreign_origin")
    assert node.submitter.requests == []


@pytest.mark.parametrize(
    "headers", [{"Host": "localhost:9000"}, {"Host": "[::1]:1"}, {"Origin": "http://localhost:3000"}]
)
async def test_this_machine_can_use_an_open_node_under_any_of_its_names(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    assert (await client.get("/swarm/status", headers=headers)).status_code == 200


async def test_a_body_over_the_limit_is_refused_once_it_has_come(
    node: FakeNode, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    response = await client.post("/v1/chat/completions", content=b"x" * (4 << 20))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_body_without_end_does_not_hold_its_connection(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(guard, "DISCARD_TIMEOUT_S", 0.1)

    async def send_for_ever(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(b"x" * 65536)

    with trio.fail_after(5):
        async with serve_node(node) as url, await send_request(url, "/v1/completions", b"", length=1 << 40) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await send_for_ever(stream)


async def test_a_body_that_does_not_come_is_given_up(autojump_clock: object) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        await trio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await make_app(FakeNode(), None)(scope, receive, send)
    assert sent[0]["status"] == 408
