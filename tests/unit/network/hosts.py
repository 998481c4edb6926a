"""Hosts for the tests of the cures: ours, and the library's own with its defaults."""

import gc
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.tools.anyio_service import Service, background_trio_service
from multiaddr import Multiaddr

from node.network.host import Libp2pNetwork
from node.network.interface import Network

from .conftest import echo, receive_exactly

ECHO = "/test/echo/1"
TOPIC = "test/topic"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GARBAGE = [
    b"",
    b"\x00",
    b"\xff" * 64,
    b"\x05hello",
    b"\x80" * 20,
    b"\xff\xff\xff\xff\x0f",
    *(bytes([size]) + random.Random(size).randbytes(size) for size in range(1, 100, 9)),
]


class Crashed(Exception):
    """A defect, of a handler or a validator."""


class FragileService(Service):
    """A service whose task fails."""

    def __init__(self) -> None:
        self.failed = trio.Event()

    async def run(self) -> None:
        self.manager.run_task(self._fail)
        await self.manager.wait_finished()

    async def _fail(self) -> None:
        self.failed.set()
        raise Crashed


def our_host(number: int = 1, **arguments: Any) -> Libp2pNetwork:
    network = Libp2pNetwork(number.to_bytes(32, "big"), listen=[LOOPBACK], **arguments)
    network.set_stream_handler(ECHO, echo)
    network.join_topic(TOPIC, lambda peer, data: True)
    network.register_record("metaswarm", lambda key, value: True, lambda key, values: 0)
    return network


@asynccontextmanager
async def library_host(number: int, **arguments: Any) -> AsyncIterator[IHost]:
    """Run the library's own host with its defaults."""
    host = new_host(create_new_key_pair(number.to_bytes(32, "big")), **arguments)
    async with host.run([Multiaddr(LOOPBACK)]):
        yield host


@asynccontextmanager
async def library_pubsub(host: IHost) -> AsyncIterator[Pubsub]:
    router = GossipSub([TProtocol("/meshsub/1.1.0")], 6, 4, 12, heartbeat_interval=1)
    pubsub = Pubsub(host, router)
    async with background_trio_service(pubsub), background_trio_service(router):
        await pubsub.wait_until_ready()
        yield pubsub


@asynccontextmanager
async def plaintext_host() -> AsyncIterator[IHost]:
    """Run a host that offers no encryption."""
    key_pair = create_new_key_pair((55).to_bytes(32, "big"))
    host = new_host(key_pair, sec_opt={TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(key_pair)})
    async with host.run([Multiaddr(LOOPBACK)]):
        yield host


@asynccontextmanager
async def silent_port() -> AsyncIterator[int]:
    """Take a port where connections are accepted by the kernel, and by nobody else."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield listener.socket.getsockname()[1]


def close_every_socket() -> None:
    """Close what the library's hosts leave to the garbage collector, which would find it in somebody else's test."""
    for each in gc.get_objects():
        if issubclass(type(each), socket.socket):  # isinstance would ask strange objects for their class
            each.close()


def address_of(host: IHost) -> str:
    return str(host.get_addrs()[0])


async def join(host: IHost, address: str) -> PeerInfo:
    info = info_from_p2p_addr(Multiaddr(address))
    await host.connect(info)
    return info


async def throw(host: IHost, address: str, protocol: str, payloads: Sequence[bytes]) -> None:
    """Write each payload to a stream of its own."""
    info = await join(host, address)
    for payload in payloads:
        with suppress(Exception):
            stream = await host.new_stream(info.peer_id, [TProtocol(protocol)])
            await stream.write(payload)
            await stream.close()


async def assert_serves(network: Network, number: int = 77) -> None:
    """An honest newcomer is served."""
    newcomer = our_host(number)
    async with newcomer.running():
        await newcomer.connect(network.multiaddrs[0])
        stream = await newcomer.open_stream(network.peer_id, ECHO)
        await stream.send_all(b"still there?")
        assert await receive_exactly(stream, 12) == b"still there?"
