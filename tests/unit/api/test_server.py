import json
import socket
from functools import partial

import h2.config
import h2.connection
import h11
import httpx
import hypercorn
import pytest
import trio
from hypercorn.trio.tcp_server import MAX_RECV

from node.api import server
from node.api.access import Access
from node.api.application import make_app
from node.api.server import GRACE_S, serve, url_of
from node.config import StartError
from tests.unit.api.fakes import FakeNode, chat_body, send_request, serve_node


async def test_taken_port_is_start_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port} on 127.0.0.1 is taken") as caught:
            await serve(make_app(FakeNode(), Access()), "127.0.0.1", port)
        assert "\n" not in str(caught.value)


async def test_foreign_address_is_start_error() -> None:
    with pytest.raises(StartError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await serve(make_app(FakeNode(), Access()), "192.0.2.1", 0)


async def test_stop_waits_for_running_answer() -> None:
    node = FakeNode()
    stop = trio.Event()
    with trio.fail_after(GRACE_S):
        async with trio.open_nursery() as nursery:
            start = partial(serve, make_app(node, Access()), "127.0.0.1", 0, stop=stop)
            port: int = await nursery.start(start)
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            body = chat_body(stream=True)
            async with httpx.AsyncClient() as client, client.stream("POST", url, json=body) as response:
                stop.set()
                text = (await response.aread()).decode()
    assert text.endswith("data: [DONE]\n\n")
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_cancel_ends_running_answer() -> None:
    node = FakeNode()
    node.submitter.hang = True
    with trio.fail_after(5):
        async with serve_node(node) as url, httpx.AsyncClient(base_url=url) as client:
            request = client.build_request("POST", "/v1/chat/completions", json=chat_body(stream=True))
            await client.send(request, stream=True)
    assert node.submitter.left.is_set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat_body()),
        ("/v1/chat/completions", chat_body(stream=True)),
        ("/v1/embeddings", {"model": "tiny", "input": "Hi"}),
        ("/api/embed", {"model": "tiny", "input": []}),
        ("/swarm/bench", {"model": "tiny"}),
    ],
)
@pytest.mark.parametrize(
    ("version", "headers"), [("1.0", ""), ("1.1", "Connection: close\r\n"), ("1.1", "Connection: keep-alive\r\n")]
)
async def test_closes_connection_after_answer(
    path: str, body: dict[str, object], version: str, headers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or after the limit of an idle one."""
    monkeypatch.setattr(hypercorn.Config, "keep_alive_timeout", 0.05)
    headers += "Content-Type: application/json\r\n"
    with trio.fail_after(4):
        async with serve_node(FakeNode()) as url:
            request = json.dumps(body).encode()
            async with await send_request(url, path, request, version=version, headers=headers) as stream:
                answer = b"".join([part async for part in stream])
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no TCP_USER_TIMEOUT (Linux has)")
async def test_disconnects_stalled_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_TIMEOUT_S", 0.3)
    node = FakeNode()
    node.submitter.words = ("x" * (1 << 20),) * 64
    with trio.fail_after(20):
        async with serve_node(node) as url:
            body = {"model": "tiny", "prompt": "Hi", "stream": True}
            async with await send_request(url, "/v1/completions", json.dumps(body).encode()):
                await node.submitter.left.wait()


def test_url_of_unspecified_host_is_loopback() -> None:
    assert url_of("127.0.0.1", 8642) == "http://127.0.0.1:8642"
    assert url_of("0.0.0.0", 8642) == "http://127.0.0.1:8642"
    assert url_of("::", 8642) == "http://[::1]:8642"
    assert url_of("swarm.example.org", 80) == "http://swarm.example.org:80"


async def connect(url: str) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))


async def test_client_that_offers_http_2_is_answered_over_http_1() -> None:
    with trio.fail_after(5):
        async with serve_node(FakeNode()) as url, httpx.AsyncClient(base_url=url) as client:
            offer = {"connection": "upgrade, http2-settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}
            answer = await client.get("/health", headers=offer)
            assert (answer.status_code, answer.http_version) == (200, "HTTP/1.1")


_H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize(
    ("headers", "more"),
    [
        pytest.param(_H2C, (), id="http-2"),
        pytest.param("", (b"\r\n",), id="line-end"),
        pytest.param("", (b"GET /health HTTP/1.1\r\nHost: ", b"localhost\r\n\r\n"), id="request"),
    ],
)
async def test_job_ends_when_its_client_leaves_whatever_it_sent_behind_the_request(
    headers: str, more: tuple[bytes, ...]
) -> None:
    node = FakeNode()
    node.submitter.hang = True
    headers += "Content-Type: application/json\r\n"
    with trio.fail_after(5):
        async with serve_node(node) as url:
            body = json.dumps(chat_body()).encode()
            behind = b"".join(more[:1])
            client = await send_request(url, "/v1/chat/completions", body + behind, len(body), headers=headers)
            await node.submitter.entered.wait()
            for data in more[1:]:
                await client.send_all(data)
            await client.aclose()
            await node.submitter.left.wait()


async def test_request_behind_another_is_answered_when_that_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it comes in parts, and is the last one that the connection takes."""
    node = FakeNode()
    node.submitter.ponders_s = 0.05
    headers = "Content-Type: application/json\r\n"
    with trio.fail_after(5):
        async with serve_node(node) as url:
            body = json.dumps(chat_body()).encode()
            more = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            async with await send_request(
                url, "/v1/chat/completions", body + more[:9], len(body), headers=headers
            ) as client:
                await node.submitter.entered.wait()
                await client.send_all(more[9:])
                answers = b"".join([data async for data in client])
    assert answers.count(b"HTTP/1.1 200") == 2
    assert b"chat.completion" in answers.partition(b"\r\n\r\n")[2]


async def test_little_is_held_of_many_requests_behind_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    most_bytes = 0
    receive = h11.Connection.receive_data

    def received(connection: h11.Connection, data: bytes) -> None:
        nonlocal most_bytes
        receive(connection, data)
        most_bytes = max(most_bytes, len(connection.trailing_data[0]))

    monkeypatch.setattr(h11.Connection, "receive_data", received)
    count = 120
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Padding: " + b"x" * 5000 + b"\r\n%s\r\n"
    with trio.fail_after(20):
        async with serve_node(FakeNode()) as url, await connect(url) as client, trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, request % b"" * (count - 1) + request % b"Connection: close\r\n")
            answers = b"".join([data async for data in client])
    assert answers.count(b"HTTP/1.1 200") == count
    assert most_bytes < 2 * MAX_RECV


async def test_client_that_begins_with_http_2_is_refused_and_leaves_nothing() -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    with trio.fail_after(5):
        async with serve_node(FakeNode()) as url, await connect(url) as stream:
            await stream.send_all(client.data_to_send())
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 4")
            while await stream.receive_some():
                pass


async def test_evicts_silent_connection_at_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    with trio.fail_after(20):
        async with serve_node(FakeNode()) as url:
            port = int(url.rpartition(":")[2])
            held = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(40)]
            async with httpx.AsyncClient(base_url=url) as client:
                assert (await client.get("/health")).status_code == 200
            for stream in held:
                await stream.aclose()


async def test_connection_over_limit_gets_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    with trio.fail_after(20):
        async with serve_node(FakeNode()) as url:
            held = [await send_request(url, "/v1/completions", b"{", length=1000) for _ in range(8)]
            async with httpx.AsyncClient(base_url=url) as client:
                while (answer := await client.get("/health")).status_code == 200:
                    await trio.lowlevel.checkpoint()  # the server has not looked at all of them yet
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["x-request-id"].startswith("req_")
                assert answer.json()["error"]["code"] == "too_many_connections"
                for stream in held:
                    await stream.aclose()
                while (await client.get("/health")).status_code != 200:
                    await trio.sleep(0.01)
