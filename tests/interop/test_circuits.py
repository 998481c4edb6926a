"""Circuits between this implementation and js-libp2p: either is the relay, the peer behind it, or the dialler."""

import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from node.network.host import Libp2pNetwork
from node.network.interface import Stream
from node.network.traversal import TraversalOptions
from protocol.announcements import Verdict

SCRIPT = Path(__file__).parent / "circuit.mjs"
ECHO = "/test/echo/1"
SIZE = 40_000
"""Bytes sent through a circuit: several frames, and less than any relay allows a peer that it does not know."""
TIMEOUT_S = 60


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@asynccontextmanager
async def js(node_js: str, *arguments: str) -> AsyncIterator[dict[str, Any]]:
    """Run the script; yield what it prints."""
    command = [node_js, str(SCRIPT), *arguments]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with trio.fail_after(TIMEOUT_S):
            told = b""
            while not told.endswith(b"\n"):
                data = await process.stdout.receive_some()
                assert data, "the script ended: its standard error says why"
                told += data
        yield json.loads(told)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


@asynccontextmanager
async def relay(kind: str, node_js: str) -> AsyncIterator[str]:
    """Run a relay; yield its address."""
    if kind == "js":
        async with js(node_js, "relay") as told:
            yield told["addresses"][0]
        return
    network = Libp2pNetwork(
        b"r" * 32, listen=["/ip4/127.0.0.1/tcp/0"], traversal=TraversalOptions(verdict=Verdict.PUBLIC)
    )
    async with network.running():
        yield network.multiaddrs[0]


def hidden(seed: bytes) -> Libp2pNetwork:
    """Return a peer that nobody can dial."""
    network = Libp2pNetwork(seed * 32, listen=[], traversal=TraversalOptions(verdict=Verdict.PRIVATE))
    network.set_stream_handler(ECHO, echo)
    return network


@asynccontextmanager
async def listener(kind: str, node_js: str, through: str) -> AsyncIterator[str]:
    """Run a peer with a reservation; yield its address, which is a circuit's."""
    if kind == "js":
        async with js(node_js, "listen", through) as told:
            yield next(each for each in told["addresses"] if "/p2p-circuit" in each)
        return
    network = hidden(b"l")
    async with network.running():
        await network.connect(through)
        with trio.fail_after(TIMEOUT_S):
            while not network.multiaddrs:  # it listens on nothing: a circuit is its only address
                await trio.sleep(0.05)
        yield network.multiaddrs[0]


async def dialled_by_py(address: str) -> None:
    network = hidden(b"d")
    async with network.running():
        peer = await network.connect(address)
        way = network.way_to(peer)
        assert way is not None
        assert way.relay is not None
        assert way.relay in address
        sent = bytes(range(250)) * (SIZE // 250)
        stream = await network.open_stream(peer, ECHO)
        await stream.send_all(sent)
        received = b""
        while len(received) < len(sent):
            data = await stream.receive_some()
            assert data
            received += data
        await stream.aclose()
        assert received == sent


async def dialled_by_js(node_js: str, address: str) -> None:
    async with js(node_js, "dial", address, str(SIZE)) as found:
        assert found["echoed"]
        assert found["limited"], "neither is known to the other's swarm: the relay says how little it may carry"
        assert address.endswith(found["peer_id"])
        assert "/p2p-circuit" in found["address"]


@pytest.mark.parametrize(
    ("relaying", "listening", "dialling"),
    [
        ("js", "py", "py"),
        ("js", "py", "js"),
        ("py", "js", "py"),
        ("py", "js", "js"),
        ("js", "js", "py"),
        ("py", "py", "js"),
    ],
)
async def test_circuit_of_two_implementations(relaying: str, listening: str, dialling: str, node_js: str) -> None:
    with trio.fail_after(3 * TIMEOUT_S):
        async with relay(relaying, node_js) as through, listener(listening, node_js, through) as address:
            if dialling == "py":
                await dialled_by_py(address)
            else:
                await dialled_by_js(node_js, address)
