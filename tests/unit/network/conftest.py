"""Both networks, made the same way: what holds for one must hold for the other."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from node.network.host import Libp2pNetwork
from node.network.interface import Network, Stream
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.identity import PeerId, peer_id_from_public_key


class Workbench:
    """Makes networks of one kind. The same number gives the same identity."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.0002))

    def network(self, number: int, **arguments: Any) -> Network:
        seed = number.to_bytes(32, "big")
        if self.kind == "libp2p":
            return Libp2pNetwork(seed, listen=["/ip4/127.0.0.1/tcp/0"], **arguments)
        return self._hub.network(self.peer_id(number))

    def peer_id(self, number: int) -> PeerId:
        return peer_id_from_public_key(number.to_bytes(32, "big"))

    @asynccontextmanager
    async def running(
        self, count: int, prepare: Callable[[Network], None] = lambda network: None
    ) -> AsyncIterator[list[Network]]:
        """Run so many networks, all but the first connected to the first."""
        networks = [self.network(number) for number in range(1, count + 1)]
        async with AsyncExitStack() as stack:
            for network in networks:
                prepare(network)
                await stack.enter_async_context(network.running())
                if network is not networks[0]:
                    await network.connect(networks[0].multiaddrs[0])
            yield networks


@pytest.fixture(params=["libp2p", "memory"])
def bench(request: pytest.FixtureRequest) -> Workbench:
    return Workbench(request.param)


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def receive_exactly(stream: Stream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = await stream.receive_some(size - len(received))
        assert chunk, f"the stream ended after {len(received)} of {size} bytes"
        received += chunk
    return bytes(received)


async def receive_all(stream: Stream) -> bytes:
    received = bytearray()
    while chunk := await stream.receive_some():
        received += chunk
    return bytes(received)


def limited(seconds: float = 10.0) -> AbstractContextManager[Any]:
    """Bound a test: nothing here may hang."""
    return trio.fail_after(seconds)


async def until(condition: Callable[[], object]) -> None:
    """Wait until what other tasks do makes the condition true."""
    while not condition():
        await trio.testing.wait_all_tasks_blocked(0.01)


async def send_for_ever(stream: Stream) -> None:
    while True:
        await stream.send_all(b"anybody there?")
