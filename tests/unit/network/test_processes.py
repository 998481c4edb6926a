"""Peers in processes of their own: killed, stopped, and silent on standard output."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError, PeerConnected, PeerDisconnected, StreamClosed
from node.network.limits import NetworkLimits
from node.network.yamux_stream import YamuxLimits
from protocol.identity import PeerId

from .conftest import limited, receive_exactly

ECHO = "/test/echo/1"
SERVER = """
import trio
from node.network.host import Libp2pNetwork

async def echo(stream):
    while data := await stream.receive_some():
        await stream.send_all(data)

async def main():
    network = Libp2pNetwork(bytes(31) + b"S", listen=["/ip4/127.0.0.1/tcp/0"])
    network.set_stream_handler("/test/echo/1", echo)
    network.join_topic("t", lambda peer, data: True)
    async with network.running():
        print(network.multiaddrs[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""
LIMITS = NetworkLimits(request_timeout_s=1, streams=YamuxLimits(keepalive_s=0.5, write_timeout_s=1))


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    @property
    def peer(self) -> PeerId:
        return PeerId(self.address.rsplit("/", 1)[1])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    if server.process.poll() is None:
        server.signal(signal.SIGCONT)
        server.process.kill()
    server.process.communicate()


def client() -> Libp2pNetwork:
    network = Libp2pNetwork(bytes(31) + b"C", listen=["/ip4/127.0.0.1/tcp/0"], limits=LIMITS)
    network.join_topic("t", lambda peer, data: True)
    return network


async def test_killed_peer_is_detected_at_once(server: Server) -> None:
    network = client()
    with limited():
        async with network.running(), network.events() as events:
            await network.connect(server.address)
            stream = await network.open_stream(server.peer, ECHO)
            await stream.send_all(b"x")
            assert await receive_exactly(stream, 1) == b"x"
            assert await anext(events) == PeerConnected(server.peer)
            server.signal(signal.SIGKILL)
            with trio.fail_after(1):
                with pytest.raises(StreamClosed):
                    await stream.receive_some()
                assert await anext(events) == PeerDisconnected(server.peer)


async def test_stopped_peer_hits_keepalive_timeout(server: Server) -> None:
    network = client()
    with limited():
        async with network.running(), network.events() as events:
            await network.connect(server.address)
            stream = await network.open_stream(server.peer, ECHO)
            server.signal(signal.SIGSTOP)
            started = trio.current_time()
            with pytest.raises(NetworkError):
                await network.ping(server.peer)
            with pytest.raises(StreamClosed):
                await stream.receive_some()
            assert await anext(events) == PeerConnected(server.peer)
            assert await anext(events) == PeerDisconnected(server.peer)
            assert trio.current_time() - started < 3


async def test_write_to_stopped_peer_times_out_while_others_are_served(server: Server) -> None:
    network, other = client(), Libp2pNetwork(bytes(31) + b"O", listen=["/ip4/127.0.0.1/tcp/0"])
    with limited():
        async with network.running(), other.running():
            await network.connect(server.address)
            await network.connect(other.multiaddrs[0])
            stream = await network.open_stream(server.peer, ECHO)
            server.signal(signal.SIGSTOP)
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    with pytest.raises(StreamClosed):
                        await stream.send_all(bytes(64 << 20))

                nursery.start_soon(write)
                assert await network.ping(other.peer_id) < 0.5


async def test_briefly_stopped_peer_stays_connected(server: Server) -> None:
    network = Libp2pNetwork(bytes(31) + b"C", listen=["/ip4/127.0.0.1/tcp/0"])
    with limited():
        async with network.running():
            await network.connect(server.address)
            stream = await network.open_stream(server.peer, ECHO)
            server.signal(signal.SIGSTOP)
            await stream.send_all(bytes(100_000))
            server.signal(signal.SIGCONT)
            assert await receive_exactly(stream, 100_000) == bytes(100_000)


async def test_garbage_prints_nothing_to_stdout_or_stderr(server: Server) -> None:
    network = client()
    port = int(server.address.split("/")[4])
    with limited():
        for payload in (b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n\x07/noise\n" + bytes(100)):
            connection = await trio.open_tcp_stream("127.0.0.1", port)
            await connection.send_all(payload)
            await connection.aclose()
        async with network.running():
            await network.connect(server.address)
            with pytest.raises(NetworkError):
                await network.open_stream(server.peer, "/no/such/protocol")
            for garbage in (b"\x80\x80", b"\x05hello"):
                for protocol in ("/ipfs/kad/1.0.0", "/meshsub/1.1.0"):
                    stream = await network.open_stream(server.peer, protocol)
                    await stream.send_all(garbage)
                    await stream.aclose()
            stream = await network.open_stream(server.peer, ECHO)
            await stream.send_all(b"x")
            assert await receive_exactly(stream, 1) == b"x"
        server.signal(signal.SIGKILL)
        out, err = await trio.to_thread.run_sync(server.process.communicate)
        assert (out, err) == ("", "")
