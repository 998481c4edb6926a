import json
import socket
from functools import partial

import h2.config
import h2.connection
import h2.events
import h2.settings
import httpx
import hypercorn
import pytest
import trio
from starlette.types import Message, Receive, Scope, Send

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


async def test_http2_connection_has_few_streams() -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    with trio.fail_after(5):
        async with serve_node(FakeNode()) as url:
            stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
            async with stream:
                await stream.send_all(client.data_to_send())
                events: list[h2.events.Event] = []
                while not any(isinstance(event, h2.events.RemoteSettingsChanged) for event in events):
                    events += client.receive_data(await stream.receive_some())
                assert client.remote_settings.max_concurrent_streams == server.MAX_STREAMS == 16
                client.remote_settings.acknowledge()
                client.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
                client.remote_settings.acknowledge()
                for number in range(17):  # a client that does not keep to it
                    head = [(":method", "POST"), (":path", "/health"), (":scheme", "http"), (":authority", "127.0.0.1")]
                    client.send_headers(1 + 2 * number, head)
                await stream.send_all(client.data_to_send())
                while data := await stream.receive_some():
                    events += client.receive_data(data)
    assert any(isinstance(event, h2.events.ConnectionTerminated) for event in events)


async def test_http2_client_that_took_no_answer_and_left_frees_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(server, "GONE_S", 0.1)
    with trio.fail_after(10):
        async with serve_node(FakeNode()) as url:
            for _ in range(4):
                client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
                client.initiate_connection()
                client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
                head = [(":method", "GET"), (":path", "/health"), (":scheme", "http"), (":authority", "127.0.0.1")]
                client.send_headers(1, head, end_stream=True)
                stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
                async with stream:
                    await stream.send_all(client.data_to_send())
                    events: list[h2.events.Event] = []
                    while not any(isinstance(event, h2.events.ResponseReceived) for event in events):
                        events += client.receive_data(await stream.receive_some())
            async with httpx.AsyncClient(base_url=url) as other:
                while (await other.get("/health")).status_code != 200:
                    await trio.sleep(0.01)


async def send_http2(url: str, body: object) -> trio.SocketStream:
    """Ask for a chat over HTTP/2, and take none of the answer."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    head = [(":method", "POST"), (":path", "/v1/chat/completions"), (":scheme", "http"), (":authority", "127.0.0.1")]
    client.send_headers(1, head)
    client.send_data(1, json.dumps(body).encode(), end_stream=True)
    stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
    await stream.send_all(client.data_to_send())
    return stream


@pytest.mark.parametrize("stream", [False, True])
async def test_http2_client_that_takes_no_answer_is_disconnected(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(server, "STALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(hypercorn.Config, "keep_alive_timeout", 0.05)
    node = FakeNode()
    node.submitter.words = ("x" * 70_000,) * 3
    with trio.fail_after(10):
        async with serve_node(node) as url, await send_http2(url, chat_body(stream=stream)) as reader:
            while await reader.receive_some():
                pass
    assert node.submitter.running == 0


@pytest.mark.parametrize("size", [0, 1, server.PIECE_BYTES, 10 * server.PIECE_BYTES + 1])
async def test_http2_client_that_reads_slowly_gets_its_answer(virtual_clock: object, size: int) -> None:
    """Each piece within the limit, the whole beyond it."""
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def send_slowly(message: Message) -> None:
        await trio.sleep(0.9 * server.STALL_TIMEOUT_S)
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    await server.StallLimit(app)({"type": "http", "http_version": "2"}, receive, send_slowly)
    assert b"".join(message.get("body", b"") for message in sent) == body + body
    assert [message.get("more_body") for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    assert all(len(message.get("body", b"")) <= server.PIECE_BYTES for message in sent)


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
