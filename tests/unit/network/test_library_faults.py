"""What the library's host does to those who trust it: one test for each fault that node/network cures.

When an upgrade of the library makes a test here fail, the fault is mended and its cure may go; node/network/README.md
says which cure that is.
"""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.abc import IHost, INetStream, ISubscriptionAPI
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.exceptions import StreamFailure
from libp2p.kad_dht.common import PROTOCOL_ID as DHT_PROTOCOL
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.exceptions import StreamError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.pubsub.pubsub import Pubsub
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from node.network.guarded_host import start_service

from .conftest import limited, until
from .hosts import (
    ECHO,
    GARBAGE,
    LOOPBACK,
    TOPIC,
    Crashed,
    FragileService,
    address_of,
    close_every_socket,
    join,
    library_host,
    library_pubsub,
    plaintext_host,
    silent_port,
    throw,
)

# The library's hosts leave their sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _close_what_the_library_leaves_open() -> Iterator[None]:
    yield
    close_every_socket()


async def test_library_dies_of_garbage_on_gossip_protocol() -> None:
    async def scene() -> None:
        async with library_host(1) as victim, library_pubsub(victim), library_host(2) as stranger:
            await throw(stranger, address_of(victim), "/meshsub/1.1.0", GARBAGE)
            await trio.sleep_forever()

    with limited(), pytest.raises(BaseExceptionGroup):
        await scene()


async def test_library_dies_of_failing_handler() -> None:
    async def crash(stream: INetStream) -> None:
        raise Crashed

    async def scene() -> None:
        async with library_host(1) as victim, library_host(2) as stranger:
            victim.set_stream_handler(TProtocol(ECHO), crash)
            await throw(stranger, address_of(victim), ECHO, [b"x"])
            await trio.sleep_forever()

    with limited(), pytest.raises(BaseExceptionGroup) as caught:
        await scene()
    assert caught.group_contains(Crashed)


async def test_library_dies_of_failing_gossip_validator() -> None:
    def crash(forwarder: object, message: object) -> bool:
        raise Crashed

    async def scene() -> None:
        async with library_host(1) as victim, library_pubsub(victim) as listener:
            listener.set_topic_validator(TOPIC, crash, is_async_validator=False)
            await listener.subscribe(TOPIC)
            async with library_host(2) as stranger, library_pubsub(stranger) as publisher:
                await join(stranger, address_of(victim))
                await publisher.wait_for_subscription(victim.get_id(), TOPIC)
                await publisher.publish(TOPIC, b"x")
                await trio.sleep_forever()

    with limited(), pytest.raises(BaseExceptionGroup) as caught:
        await scene()
    assert caught.group_contains(Crashed)


async def test_library_ends_service_and_program_when_a_task_fails() -> None:
    with limited(), pytest.raises(BaseExceptionGroup) as caught:
        async with background_trio_service(FragileService()):
            await trio.sleep_forever()
    assert caught.group_contains(Crashed)


async def test_library_shares_taken_port_silently() -> None:
    with limited():
        async with library_host(1) as first:
            port = address_of(first).split("/")[4]
            second = new_host(create_new_key_pair(bytes(32)))
            async with second.run([Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")]):
                assert second.get_transport_addrs() == first.get_transport_addrs()


async def test_library_is_deaf_after_hundreds_of_short_connections() -> None:
    config = ConnectionConfig(max_connections=4, min_connections=0, low_watermark=0, high_watermark=4)
    host = new_host(create_new_key_pair(bytes(32)))
    swarm = host.get_network()
    assert isinstance(swarm, Swarm)
    swarm.connection_config = config
    swarm._init_connection_management()
    with limited():
        async with host.run([Multiaddr(LOOPBACK)]):
            for number in range(2, 6):
                async with library_host(number) as visitor:
                    await join(visitor, address_of(host))
            assert swarm._inbound_limiter.available_tokens == 0
            async with library_host(9) as late:
                with pytest.raises(Exception, match="unable to connect"):
                    await join(late, address_of(host))


async def test_library_accepts_unencrypted_connection() -> None:
    with limited():
        async with library_host(1) as host, plaintext_host() as visitor:
            await join(visitor, address_of(host))


async def test_library_delays_every_dial_by_a_quarter_second() -> None:
    with limited():
        async with library_host(1) as host, library_host(2) as dialler:
            started = trio.current_time()
            await join(dialler, address_of(host))
            assert trio.current_time() - started >= 0.25


async def test_library_backoff_refuses_redial_for_a_minute() -> None:
    with limited():
        async with library_host(2) as dialler:
            async with silent_port() as port:
                pass
            address = f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooWGs41cbzKXjX8pwMXi2ZqJRn52DUhSvRhF4FKx2Qwh7qV"
            with pytest.raises(Exception, match="unable to connect"):
                await join(dialler, address)
            with pytest.raises(Exception, match="negative cache"):
                await join(dialler, address)


async def test_library_dials_every_known_peer() -> None:
    with limited(), trio.CancelScope() as scope:
        async with library_host(1) as known:
            host = new_host(create_new_key_pair(bytes(32)))
            host.get_peerstore().add_addrs(known.get_id(), known.get_transport_addrs(), 600)
            async with host.run([Multiaddr(LOOPBACK)]):
                await until(host.get_connected_peers)
                scope.cancel()


class _Anything(Validator):
    def validate(self, key: str, value: bytes) -> None: ...

    def select(self, key: str, values: list[bytes]) -> int:
        return values.index(max(values))


@asynccontextmanager
async def library_dhts(*hosts: IHost) -> AsyncIterator[list[KadDHT]]:
    """Run the library's DHT on hosts that are connected to each other, with routing tables that are filled."""
    for host in hosts[1:]:
        await join(host, address_of(hosts[0]))
    async with trio.open_nursery() as nursery:
        dhts = [
            KadDHT(
                host, DHTMode.SERVER, validator=NamespacedValidator({"metaswarm": _Anything()}), validator_changed=True
            )
            for host in hosts
        ]
        for dht in dhts:
            await start_service(nursery, dht)
        for dht in dhts:
            await dht.refresh_routing_table()
        yield dhts
        nursery.cancel_scope.cancel()


async def test_library_answers_dht_lookup_from_old_local_copy() -> None:
    with limited():
        async with library_host(1) as a, library_host(2) as b, library_dhts(a, b) as (first, second):
            await first.put_value("/metaswarm/x", b"1")
            assert await second.get_value("/metaswarm/x") == b"1"
            second.value_store.put(b"/metaswarm/x", b"0")
            await first.put_value("/metaswarm/x", b"2")
            second.value_store.put(b"/metaswarm/x", b"1")
            assert await second.get_value("/metaswarm/x") == b"1"


async def test_library_refuses_dht_lookups_of_long_keys() -> None:
    async with library_host(1) as a, library_host(2) as b, library_host(3) as c:
        with limited():
            async with library_dhts(a, b, c) as (first, second, _):
                found = await first.peer_routing._query_peer_for_closest(b.get_id(), b"/metaswarm/" + bytes(41))
                assert found == []
                assert await first.peer_routing._query_peer_for_closest(b.get_id(), b"/metaswarm/" + bytes(32))
                assert second.routing_table.size() >= 1


async def test_library_drops_eleventh_dht_announcement() -> None:
    with limited():
        async with library_host(1) as a, library_host(2) as b, library_dhts(a, b) as (keeper, provider):
            for number in range(12):
                await provider.provide(bytes([number] * 32).hex())
            await trio.testing.wait_all_tasks_blocked(0.05)
            kept = [number for number in range(12) if keeper.provider_store.get_providers(bytes([number] * 32))]
            assert kept == list(range(10))


async def test_library_drops_gossip_beyond_ten_messages_a_second() -> None:
    with limited():
        async with (
            library_host(1) as a,
            library_pubsub(a) as listener,
            library_host(2) as b,
            library_pubsub(b) as publisher,
        ):
            subscription = await listener.subscribe(TOPIC)
            await publisher.subscribe(TOPIC)
            await join(b, address_of(a))
            await publisher.wait_for_mesh(a.get_id(), TOPIC)
            for number in range(50):
                await publisher.publish(TOPIC, bytes([number]))
                await trio.testing.wait_all_tasks_blocked()
            heard = []
            with trio.move_on_after(0.3):
                while True:
                    heard.append((await subscription.get()).data)
            assert len(heard) < 50


async def test_library_loses_gossip_one_way_after_quick_reconnection() -> None:
    async def heard(listener: ISubscriptionAPI, publisher: Pubsub) -> bool:
        with trio.move_on_after(0.7):
            while True:
                await publisher.publish(TOPIC, b"x")
                with trio.move_on_after(0.1):
                    while (await listener.get()).from_id != publisher.my_id.to_bytes():
                        pass
                    return True
        return False

    with limited(20):
        async with library_host(1) as a, library_pubsub(a) as one, library_host(2) as b, library_pubsub(b) as other:
            at_one, at_other = await one.subscribe(TOPIC), await other.subscribe(TOPIC)
            await join(b, address_of(a))
            while not (await heard(at_one, other) and await heard(at_other, one)):
                pass
            for _ in range(5):  # a race, which is lost nearly always
                (connection,) = b.get_network().get_connections(a.get_id())
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.close)
                    await until(lambda: not b.get_network().get_connections(a.get_id()))
                    await join(b, address_of(a))
                await heard(at_one, other)
                await heard(at_other, one)
                if not (await heard(at_one, other) and await heard(at_other, one)):
                    return
            pytest.fail("gossip came through after every reconnection: is the fault cured?")


# Memory


async def test_library_peer_store_is_unbounded() -> None:
    store = PeerStore()
    peer = ID.from_pubkey(create_new_key_pair(bytes(32)).public_key)
    store.add_addrs(peer, [Multiaddr(f"/ip4/192.0.2.1/tcp/{port}") for port in range(1, 1001)], 60)
    store.set_protocols(peer, [f"/x/{number}" for number in range(1000)])
    assert len(store.addrs(peer)) == 1000
    assert len(store.get_protocols(peer)) == 1000


async def test_library_leaves_a_thread_behind_per_host() -> None:
    before = threading.active_count()
    with limited():
        async with library_host(1) as host, library_pubsub(host) as pubsub:
            pass
        assert threading.active_count() > before
        pubsub.seen_messages.stop()


async def test_library_dht_is_blocked_by_idle_streams_of_one_peer() -> None:
    with limited():
        async with library_host(1) as a, library_host(2) as b, library_host(3) as c, library_dhts(a, b, c):
            # The library itself may still be asking when the last of them are opened: then these are refused, too.
            for _ in range(16):
                with suppress(StreamError, StreamFailure):
                    stream = await b.new_stream(a.get_id(), [DHT_PROTOCOL])
                    await stream.write(b"\x80")
            with pytest.raises((StreamError, StreamFailure)):
                await _ping_dht(c, a.get_id())


async def _ping_dht(host: IHost, peer: ID) -> None:
    stream = await host.new_stream(peer, [DHT_PROTOCOL])
    await stream.write(b"\x02\x08\x05")
    await stream.read(1)
