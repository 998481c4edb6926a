"""What strangers may do to our host without harming it: the cures for the faults shown in test_library_faults.py."""

import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.kad_dht.common import PROTOCOL_ID as DHT_PROTOCOL
from libp2p.peer.id import ID
from libp2p.peer.peerstore import create_signed_peer_record
from multiaddr import Multiaddr

from node.network import addresses, dht, gossip
from node.network.addresses import parse_address
from node.network.admission import SILENT_S, InboundLimits
from node.network.guarded_host import start_service
from node.network.host import Libp2pNetwork
from node.network.interface import Network, NetworkError, PeerConnected, PeerDisconnected, Stream, StreamClosed
from node.network.limits import NetworkLimits
from node.network.peerstore import BoundedPeerStore
from node.network.streams import Libp2pStream
from node.network.yamux import Yamux
from node.network.yamux_stream import YamuxLimits
from protocol.identity import PeerId
from tests.support.idle_peer import hold_idle_connection

from .conftest import limited, receive_exactly, until
from .hosts import (
    ECHO,
    GARBAGE,
    LOOPBACK,
    TOPIC,
    FragileService,
    assert_serves,
    close_every_socket,
    join,
    library_host,
    our_host,
    plaintext_host,
    silent_port,
    throw,
)

# Some of these strangers are hosts of the library, which leave their sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _close_what_the_library_leaves_open() -> Iterator[None]:
    yield
    close_every_socket()


# Garbage and defects


@pytest.mark.parametrize(
    "protocol",
    [
        "/meshsub/1.1.0",
        "/meshsub/1.2.0",
        "/ipfs/kad/1.0.0",
        "/ipfs/id/1.0.0",
        "/ipfs/id/push/1.0.0",
        "/ipfs/ping/1.0.0",
        "/libp2p/autonat/2/dial-request",
        "/libp2p/autonat/2/dial-back",
        "/libp2p/circuit/relay/0.2.0/hop",
        "/libp2p/circuit/relay/0.2.0/stop",
        "/libp2p/dcutr",
        ECHO,
    ],
)
async def test_garbage_on_any_protocol_costs_only_its_stream(protocol: str) -> None:
    victim = our_host()
    with limited(20):
        async with victim.running():
            async with library_host(2) as stranger:
                await throw(stranger, victim.multiaddrs[0], protocol, GARBAGE)
            await assert_serves(victim)


async def test_garbage_on_the_port_costs_only_its_connection() -> None:
    victim = our_host()
    with limited(20):
        async with victim.running():
            port = int(victim.multiaddrs[0].split("/")[4])
            for payload in (b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n", *GARBAGE):
                connection = await trio.open_tcp_stream("127.0.0.1", port)
                await connection.send_all(payload + b"\x13/multistream/1.0.0\n\x07/noise\n" + payload)
                await connection.aclose()
            await assert_serves(victim)


async def test_failed_task_does_not_end_its_service() -> None:
    service = FragileService()
    with limited():
        async with trio.open_nursery() as nursery:
            await start_service(nursery, service)
            await service.failed.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert service.manager.is_running
            nursery.cancel_scope.cancel()


async def test_no_library_task_outlives_the_host() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    with limited():
        first, second = our_host(1), our_host(2)
        async with first.running(), second.running():
            await second.connect(first.multiaddrs[0])
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == before


# Listening and being dialled


async def test_taken_port_is_one_line_error() -> None:
    with limited():
        async with silent_port() as port:
            taken = Libp2pNetwork(bytes(32), listen=[f"/ip4/127.0.0.1/tcp/{port}"])
            with pytest.raises(
                NetworkError, match=f"^cannot listen on /ip4/127.0.0.1/tcp/{port}: address already in use$"
            ):
                async with taken.running():
                    pass


async def test_wildcard_listen_address_is_expanded() -> None:
    network = Libp2pNetwork(bytes(32), listen=["/ip4/0.0.0.0/tcp/0"])
    with limited():
        async with network.running():
            assert network.multiaddrs
            assert all("0.0.0.0" not in address and "/tcp/0/" not in address for address in network.multiaddrs)
            assert all(address.endswith(f"/p2p/{network.peer_id}") for address in network.multiaddrs)


async def test_announced_addresses_come_before_those_of_interfaces_and_loopback_is_told_to_nobody() -> None:
    interfaces = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.168.1.2"], "docker0": ["172.17.0.1"]}
    found = {name: [SimpleNamespace(address=text) for text in texts] for name, texts in interfaces.items()}
    addresses._interface_addresses.cache_clear()
    for listen in ("/ip4/0.0.0.0/tcp/0", LOOPBACK):
        network = Libp2pNetwork(bytes(32), listen=[listen], announce=["/dns4/node.example/tcp/4001"])
        with limited(), patch("psutil.net_if_addrs", lambda: found):
            async with network.running():
                hosts = [address.split("/")[2] for address in network.multiaddrs]
                assert hosts == ["node.example", *(["192.168.1.2"] if "0.0.0.0" in listen else [])]
    addresses._interface_addresses.cache_clear()


async def test_simultaneous_dials_end_in_one_connection() -> None:
    one, two = our_host(1), our_host(2)
    with limited(20):
        async with one.running(), two.running():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.connect, two.multiaddrs[0])
                nursery.start_soon(two.connect, one.multiaddrs[0])

            def counts() -> list[int]:
                return [len(host._swarm.get_connections()) for host in (one, two) if host._swarm is not None]

            await until(lambda: counts() == [1, 1])
            for host, other in ((one, two), (two, one)):
                stream = await host.open_stream(other.peer_id, ECHO)
                await stream.send_all(b"once")
                assert await receive_exactly(stream, 4) == b"once"


async def test_own_address_is_not_dialled_for_another_peer() -> None:
    """Two homes have the same private range: what a peer there announces may be ourselves."""
    network = our_host()
    with limited():
        async with network.running():
            own = network.multiaddrs[0].rpartition("/p2p/")[0]
            with pytest.raises(NetworkError, match="no address of the peer is known"):
                await network.connect(f"{own}/p2p/{our_host(2).peer_id}")


async def test_accepts_connections_after_hundreds_have_closed() -> None:
    host = our_host(limits=NetworkLimits(max_connections=4, inbound=InboundLimits(total=4, per_origin=4, per_range=4)))
    with limited(20):
        async with host.running():
            for number in range(2, 12):
                await assert_serves(host, number)


async def test_idle_connections_do_not_lock_out_honest_peer() -> None:
    host = our_host()
    with limited(20):
        async with host.running():
            port = int(host.multiaddrs[0].split("/")[4])
            idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(300)]
            await assert_serves(host)
            with trio.fail_after(1):  # the oldest had to make room, long before its time was up
                while await idle[0].receive_some():
                    pass
            for connection in idle:
                await connection.aclose()


async def test_connections_of_one_origin_are_limited_to_active_ones() -> None:
    host = our_host(limits=NetworkLimits(inbound=InboundLimits(total=9, per_origin=2, per_range=9)))
    visitors = [our_host(number) for number in range(2, 5)]
    with limited(20):
        async with host.running(), visitors[0].running(), visitors[1].running(), visitors[2].running():
            for visitor in visitors[:2]:
                await visitor.connect(host.multiaddrs[0])
            with pytest.raises(NetworkError):
                await visitors[2].connect(host.multiaddrs[0])


async def test_idle_connections_are_evicted_for_newcomer_of_same_origin() -> None:
    host = our_host(limits=NetworkLimits(inbound=InboundLimits(total=9, per_origin=3, per_range=9)))
    with limited(20):
        async with host.running(), AsyncExitStack() as stack:
            address = host.multiaddrs[0]
            ended = [await stack.enter_async_context(hold_idle_connection(address, secured=True)) for _ in range(3)]
            await trio.sleep(SILENT_S)
            await assert_serves(host)
            await until(lambda: any(event.is_set() for event in ended))


async def test_unencrypted_connection_is_refused() -> None:
    host = our_host()
    with limited():
        async with host.running(), plaintext_host() as visitor:
            with pytest.raises(Exception, match="unable to connect"):
                await join(visitor, host.multiaddrs[0])


# Dialling


async def test_dial_adds_no_delay_to_its_handshake() -> None:
    host, dialler = our_host(1), our_host(2)
    with limited():
        async with host.running(), dialler.running():
            started = trio.current_time()
            await dialler.connect(host.multiaddrs[0])
            assert trio.current_time() - started < 0.25


async def test_simultaneous_dials_share_one_connection() -> None:
    host, dialler = our_host(1), our_host(2)
    with limited():
        async with host.running(), dialler.running(), host.events() as events:
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(dialler.connect, host.multiaddrs[0])
            assert await anext(events) == PeerConnected(dialler.peer_id)
            assert host._swarm is not None
            assert len(host._swarm.get_connections()) == 1


async def test_streams_use_latest_connection() -> None:
    host, dialler = our_host(1), our_host(2)
    with limited():
        async with host.running(), dialler.running():
            await dialler.connect(host.multiaddrs[0])
            swarm = dialler._swarm
            assert swarm is not None
            host_id = ID.from_base58(host.peer_id)
            latest = await swarm.dial_addr(Multiaddr(host.multiaddrs[0]), host_id)
            assert len(swarm.live_connections(host_id)) == 2
            stream = await dialler.open_stream(host.peer_id, ECHO)
            assert isinstance(stream, Libp2pStream)
            assert stream._muxed.muxed_conn is latest.muxed_conn


async def test_peer_stays_connected_until_last_connection_closes() -> None:
    host, dialler = our_host(1), our_host(2)
    with limited(20):
        async with host.running(), dialler.running(), dialler.events() as events:
            await dialler.connect(host.multiaddrs[0])
            await _hear(host, dialler)
            await _hear(dialler, host)
            swarm = dialler._swarm
            assert swarm is not None
            host_id = ID.from_base58(host.peer_id)
            (first,) = swarm.live_connections(host_id)
            await swarm.dial_addr(Multiaddr(host.multiaddrs[0]), host_id)
            await first.close()
            for _ in range(2):
                await _hear(host, dialler)
                await _hear(dialler, host)
            assert dialler.connected_peers() == (host.peer_id,)
            assert await anext(events) == PeerConnected(host.peer_id)
            with trio.move_on_after(0.3):
                raise AssertionError(await anext(events))
            await dialler.disconnect(host.peer_id)
            assert await anext(events) == PeerDisconnected(host.peer_id)


async def test_cancelled_dial_does_not_cancel_shared_dial() -> None:
    host, dialler = our_host(1), our_host(2)
    with limited():
        async with host.running(), dialler.running(), trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(dialler.connect, host.multiaddrs[0])
                scope.cancel()
                await dialler.connect(host.multiaddrs[0])
            await dialler.connect(host.multiaddrs[0])


async def test_dial_of_silent_peer_times_out() -> None:
    dialler = our_host(limits=NetworkLimits(dial_timeout_s=0.3))
    with limited(3):
        async with dialler.running(), silent_port() as port:
            with pytest.raises(NetworkError, match=r"did not answer within 0\.3 s"):
                await dialler.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{our_host(2).peer_id}")


async def test_no_handshake_is_sent_to_silent_client() -> None:
    host, other = our_host(1), our_host(2)
    with limited():
        async with host.running(), other.running():
            address = parse_address(host.multiaddrs[0])
            async with await trio.open_tcp_stream(address.host, address.port) as silent:
                await other.connect(host.multiaddrs[0])
                await other.ping(host.peer_id)
                assert not select.select([silent.socket.fileno()], [], [], 0)[0]
                await silent.send_all(b"\x13/multistream/1.0.0\n")
                assert await silent.receive_some(1)


async def test_swarm_key_mismatch_times_out_and_members_connect() -> None:
    limits = NetworkLimits(dial_timeout_s=1)
    host = our_host(1, swarm_key="ab" * 32)
    member = our_host(2, swarm_key="AB" * 32)
    strangers = [our_host(3, swarm_key="cd" * 32, limits=limits), our_host(4, limits=limits)]
    with limited(15):
        async with host.running(), member.running(), strangers[0].running(), strangers[1].running():
            for stranger in strangers:
                with pytest.raises(NetworkError):
                    await stranger.connect(host.multiaddrs[0])
            await member.connect(host.multiaddrs[0])
            assert await member.ping(host.peer_id) < 1


@pytest.mark.parametrize("key", ["", "ab" * 31, "xy" * 32])
def test_malformed_swarm_key_is_one_line_error(key: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal"):
        our_host(swarm_key=key)


async def test_known_peers_are_not_dialled_unasked() -> None:
    known, host = our_host(1), our_host(2)
    with limited():
        async with known.running(), known.events() as events, host.running():
            assert host._swarm is not None
            host.add_addresses(known.peer_id, known.multiaddrs)
            host._swarm.peerstore.add_addrs(ID.from_base58(known.peer_id), [Multiaddr(known.multiaddrs[0])], 600)
            await host._swarm.auto_connector.maybe_connect()
            with trio.move_on_after(0.3):
                raise AssertionError(await anext(events))


# The DHT


async def test_dht_lookup_asks_network_despite_old_local_copy() -> None:
    writer, reader = our_host(1), our_host(2)
    for network in (writer, reader):
        network.register_record("new", lambda key, value: True, lambda key, values: values.index(max(values)))
    with limited(20):
        async with writer.running(), reader.running():
            await reader.connect(writer.multiaddrs[0])
            await writer.put_record("/new/x", b"2")
            kad = reader._dht._kad
            assert kad is not None
            kad.value_store.put(dht.wire_key("/new/x").encode(), dht.wire_value("/new/x", b"1"))
            assert await reader.get_record("/new/x") == b"2"


async def test_dht_routing_table_is_filled_after_connecting() -> None:
    host, dialler = our_host(1), our_host(2)
    with limited():
        async with host.running(), dialler.running():
            await dialler.connect(host.multiaddrs[0])
            tables = [network._dht._kad for network in (host, dialler)]
            await until(lambda: all(table is not None and table.get_routing_table_size() for table in tables))


async def test_dht_keeps_thirty_announcements_in_a_row() -> None:
    keeper, provider = our_host(1), our_host(2)
    with limited(20):
        async with keeper.running(), provider.running():
            await provider.connect(keeper.multiaddrs[0])
            for number in range(30):
                await provider.provide(bytes([number] * 32))
            kad = keeper._dht._kad
            assert kad is not None
            await until(lambda: len(kad.provider_store.providers) == 30)


async def test_dht_storage_for_strangers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.dht.MAX_STORED_RECORDS", 5)
    monkeypatch.setattr("node.network.dht.MAX_STORED_PROVIDERS", 5)
    keeper, stranger = our_host(1), our_host(2)
    with limited(20):
        async with keeper.running(), stranger.running():
            await stranger.connect(keeper.multiaddrs[0])
            for number in range(8):
                await stranger.put_record(f"/metaswarm/{number}", b"x")
                await stranger.provide(bytes([number] * 32))
            kad = keeper._dht._kad
            assert kad is not None
            assert len(kad.value_store.store) == 5
            await until(lambda: len(kad.provider_store.providers) == 5)
            assert await keeper.get_record("/metaswarm/7") == b"x"


# Gossip


async def test_gossip_burst_arrives_completely() -> None:
    listener, publisher = our_host(1), our_host(2)
    with limited():
        async with listener.running(), publisher.running(), listener.subscribe(TOPIC) as messages:
            await publisher.connect(listener.multiaddrs[0])
            heard: set[bytes] = set()
            while not heard:
                await publisher.publish(TOPIC, b"warm up")
                with trio.move_on_after(0.1):
                    heard.add((await anext(messages)).data)
            for number in range(100):
                await publisher.publish(TOPIC, number.to_bytes(2, "big"))
            while len(heard) < 101:
                heard.add((await anext(messages)).data)


async def test_gossip_of_a_restarted_node_is_new_to_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    second = int(time.time())
    monkeypatch.setattr("libp2p.pubsub.pubsub.time.time", lambda: second)  # one that restarts within a second
    listener = our_host(1)

    async def hear_from_started_node(message: bytes) -> bytes:
        publisher = our_host(2)
        async with publisher.running(), listener.subscribe(TOPIC) as messages:
            await publisher.connect(listener.multiaddrs[0])
            pubsub = publisher._gossip._pubsub
            assert pubsub is not None
            await until(lambda: pubsub.peer_topics.get(TOPIC))
            await publisher.publish(TOPIC, message)
            return (await anext(messages)).data

    with limited(20):
        async with listener.running():
            for message in (b"before", b"after"):
                assert await hear_from_started_node(message) == message


async def test_gossip_flood_is_rate_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.gossip.MAX_RATE_HZ", 5.0)
    validated: list[bytes] = []

    def count(peer: PeerId, data: bytes) -> bool:
        validated.append(data)
        return True

    listener, publisher = our_host(1), our_host(2)
    listener.join_topic(TOPIC, count)
    with limited():
        async with listener.running(), publisher.running():
            await publisher.connect(listener.multiaddrs[0])
            await _hear(listener, publisher)
            for number in range(200):
                await publisher.publish(TOPIC, number.to_bytes(2, "big"))
            await until(lambda: listener._gossip.dropped)
            assert len(validated) < 50


# Bounded ends


async def test_shutdown_is_bounded_despite_hanging_handlers() -> None:
    async def stay(stream: object) -> None:
        await trio.sleep_forever()

    host, visitor = our_host(1), our_host(2)
    host.set_stream_handler("/test/stay/1", stay)
    with limited():
        async with visitor.running():
            async with host.running():
                await visitor.connect(host.multiaddrs[0])
                stream = await visitor.open_stream(host.peer_id, "/test/stay/1")
                left = trio.current_time()
            assert trio.current_time() - left < 2
            with pytest.raises(StreamClosed):
                await stream.receive_some()


async def test_stream_limit_is_one_line_error() -> None:
    limits = NetworkLimits(streams=YamuxLimits(max_streams=8))
    host, visitor = our_host(1), our_host(2, limits=limits)
    with limited():
        async with host.running(), visitor.running():
            await visitor.connect(host.multiaddrs[0])
            streams: list[Stream] = []
            with pytest.raises(NetworkError, match="8 streams to this peer are open already"):
                await _open_for_ever(visitor, host.peer_id, streams.append)
            for stream in streams:
                await stream.aclose()
            await assert_serves(host)


async def _open_for_ever(network: Network, peer: PeerId, keep: Callable[[Stream], None]) -> None:
    while True:
        keep(await network.open_stream(peer, ECHO))


async def test_gossip_flows_both_ways_over_replacement_connection() -> None:
    one, other = our_host(1), our_host(2)
    with limited(20):
        async with one.running(), other.running():
            for broken_by in (one, other):
                await other.connect(one.multiaddrs[0])
                await _hear(one, other)
                await _hear(other, one)
                assert broken_by._swarm is not None
                for connection in broken_by._swarm.get_connections():
                    assert isinstance(connection.muxed_conn, Yamux)
                    connection.muxed_conn.abort()
                await trio.testing.wait_all_tasks_blocked()
            await other.connect(one.multiaddrs[0])
            for _ in range(2):
                await _hear(one, other)
                await _hear(other, one)


async def test_gossip_flows_both_ways_after_one_stream_breaks() -> None:
    one, other = our_host(1), our_host(2)
    with limited(20):
        async with one.running(), other.running():
            await other.connect(one.multiaddrs[0])
            await _hear(one, other)
            await _hear(other, one)
            assert one._gossip._pubsub is not None
            await one._gossip._pubsub.peers[ID.from_base58(other.peer_id)].reset()
            for _ in range(2):
                await _hear(other, one)
                await _hear(one, other)


async def _hear(listener: Network, publisher: Network) -> None:
    async with listener.subscribe(TOPIC) as messages:
        while True:
            await publisher.publish(TOPIC, b"x")
            with trio.move_on_after(0.1):
                await anext(messages)
                return


# Memory


def test_peer_store_is_bounded() -> None:
    store = BoundedPeerStore()
    peer = ID.from_pubkey(create_new_key_pair(bytes(32)).public_key)
    for first in (1, 1001, 2001):
        store.add_addrs(peer, [Multiaddr(f"/ip4/192.0.2.1/tcp/{first + port}") for port in range(1000)], 60)
    store.set_protocols(peer, [f"/x/{number}" for number in range(1000)])
    store.add_protocols(peer, [f"/y/{number}" for number in range(1000)])
    assert [str(address) for address in store.addrs(peer)] == [
        f"/ip4/192.0.2.1/tcp/{2001 + port}" for port in range(16)
    ]
    assert len(store.get_protocols(peer)) == 256


def test_oversized_peer_record_is_refused() -> None:
    store = BoundedPeerStore()
    for count, taken in ((3, True), (10_000, False)):
        pair = create_new_key_pair(bytes(32))
        addresses = [Multiaddr(f"/ip4/192.0.2.1/tcp/{port}") for port in range(1, count + 1)]
        envelope = create_signed_peer_record(ID.from_pubkey(pair.public_key), addresses, pair.private_key)
        assert store.consume_peer_record(envelope, 60) is taken


async def test_host_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with limited():
        async with our_host().running():
            pass
        assert threading.active_count() <= before


async def test_idle_streams_of_one_peer_do_not_block_dht() -> None:
    host, honest = our_host(1), our_host(2)
    with limited(20):
        async with host.running(), library_host(3) as greedy:
            info = await join(greedy, host.multiaddrs[0])
            for _ in range(80):
                with suppress(Exception):
                    stream = await greedy.new_stream(info.peer_id, [DHT_PROTOCOL])
                    await stream.write(b"\x80")
            async with honest.running():
                await honest.connect(host.multiaddrs[0])
                await honest.put_record("/metaswarm/x", b"1")
            assert await host.get_record("/metaswarm/x") == b"1"


async def test_persistent_gossip_flood_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.gossip.MAX_RATE_HZ", 5.0)
    monkeypatch.setattr("node.network.gossip.DISCONNECT_DEBT", 20)
    listener, publisher = our_host(1), our_host(2)
    with limited():
        async with listener.running(), publisher.running(), listener.events() as events:
            await publisher.connect(listener.multiaddrs[0])
            assert await anext(events) == PeerConnected(publisher.peer_id)

            with trio.CancelScope() as flooding:

                async def wait() -> None:
                    assert await anext(events) == PeerDisconnected(publisher.peer_id)
                    flooding.cancel()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    while True:
                        await publisher.publish(TOPIC, b"me, me, me")
                        await trio.lowlevel.checkpoint()


def test_gossip_seen_cache_expires_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.gossip.MAX_SEEN", 3)

    async def main() -> None:
        seen = gossip._SeenMessages()
        assert seen.add(b"a")
        assert not seen.add(b"a")
        await trio.sleep(119)
        assert seen.has(b"a")
        await trio.sleep(119)
        assert seen.has(b"a")
        await trio.sleep(121)
        assert not seen.has(b"a")
        for key in (b"1", b"2", b"3", b"4"):
            seen.add(key)
        assert [seen.has(key) for key in (b"1", b"2", b"3", b"4")] == [False, True, True, True]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# Addresses


async def test_dead_peer_leaves_dht_lookups_but_stays_in_address_book() -> None:
    host, dead = our_host(1), our_host(2)
    async with dead.running():
        address = dead.multiaddrs[0]
    with limited():
        async with host.running():
            assert host._swarm is not None
            dead_id = ID.from_base58(dead.peer_id)
            host._swarm.peerstore.add_addrs(dead_id, [Multiaddr(address)], 600)
            with pytest.raises(NetworkError, match="refused"):
                await host.open_stream(dead.peer_id, ECHO)
            assert host._swarm.peerstore.addrs(dead_id) == []
            assert host.addresses_of(dead.peer_id) == (address,)


@pytest.mark.parametrize("name", ["dns4", "dns"])
async def test_dns_address_is_resolved_when_dialled(name: str) -> None:
    host, dialler = our_host(1), our_host(2)
    with limited():
        async with host.running(), dialler.running():
            port = host.multiaddrs[0].split("/")[4]
            await dialler.connect(f"/{name}/localhost/tcp/{port}/p2p/{host.peer_id}")
            assert dialler.connected_peers() == (host.peer_id,)


async def test_ipv6_connects() -> None:
    host, dialler = Libp2pNetwork(bytes(32), listen=["/ip6/::1/tcp/0"]), our_host(2)
    with limited():
        async with host.running(), dialler.running():
            assert host.multiaddrs[0].startswith("/ip6/::1/tcp/")
            await dialler.connect(host.multiaddrs[0])


@pytest.mark.parametrize(
    "address", ["", "4001", "/ip4/1.2.3.4/udp/1", "/ip4/300.0.0.1/tcp/1", "/ip4/1.2.3.4/tcp/99999"]
)
def test_malformed_listen_address_is_one_line_error(address: str) -> None:
    with pytest.raises(ValueError, match="multiaddr"):
        Libp2pNetwork(bytes(32), listen=[address])
