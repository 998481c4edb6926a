"""What both networks promise: every test runs against the real one over loopback and against the simulated one."""

import hashlib
import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from node.network.interface import (
    GossipMessage,
    Network,
    NetworkError,
    PeerConnected,
    PeerDisconnected,
    Stream,
    StreamClosed,
)
from protocol.identity import PeerId
from protocol.limits import MAX_RECORD_BYTES

from .conftest import Workbench, echo, limited, receive_all, receive_exactly, send_for_ever

ECHO = "/test/echo/1"
OTHER = "/test/other/1"
TOPIC = "test/topic"


def serve_echo(network: Network) -> None:
    network.set_stream_handler(ECHO, echo)


class Inbox:
    """A handler that hands its streams to the test and keeps them open until the test is done."""

    def __init__(self) -> None:
        self._send, self.streams = trio.open_memory_channel[Stream](64)

    async def __call__(self, stream: Stream) -> None:
        await self._send.send(stream)
        await trio.sleep_forever()


async def open_pair(bench_networks: Sequence[Network]) -> tuple[Stream, Stream]:
    """Open a stream from the second network to the first; return both ends."""
    inbox = Inbox()
    bench_networks[0].set_stream_handler(OTHER, inbox)
    near = await bench_networks[1].open_stream(bench_networks[0].peer_id, OTHER)
    return near, await inbox.streams.receive()


# Streams


async def test_stream_echoes_bytes_in_order_until_eof(bench: Workbench) -> None:
    with limited():
        async with bench.running(2, serve_echo) as (server, client):
            stream = await client.open_stream(server.peer_id, ECHO)
            assert (stream.peer, stream.protocol) == (server.peer_id, ECHO)
            await stream.send_all(b"one")
            assert await receive_exactly(stream, 3) == b"one"
            await stream.send_all(memoryview(bytearray(b"two")))
            assert await receive_exactly(stream, 3) == b"two"
            await stream.aclose()


async def test_receive_returns_at_most_max_bytes(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            await near.send_all(b"abcdef")
            assert len(await far.receive_some(4)) <= 4
            with pytest.raises(ValueError, match="max_bytes"):
                await far.receive_some(0)


async def test_data_sent_before_close_arrives_before_eof(bench: Workbench) -> None:
    payload = random.Random(1).randbytes(200_000)
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            await near.send_all(payload)
            await near.aclose()
            assert await receive_all(far) == payload
            assert await far.receive_some() == b""


async def test_opens_stream_of_first_protocol_that_peer_serves(bench: Workbench) -> None:
    with limited():
        async with bench.running(2, serve_echo) as (server, client):
            stream = await client.open_stream(server.peer_id, "/test/later", ECHO)
            assert stream.protocol == ECHO
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            with pytest.raises(NetworkError, match="/test/later or /test/latest"):
                await client.open_stream(server.peer_id, "/test/later", "/test/latest")


async def test_data_sent_before_host_stops_arrives(bench: Workbench) -> None:
    """The last words of a host that leaves politely are complete."""
    server = bench.network(1)
    inbox = Inbox()
    server.set_stream_handler(OTHER, inbox)
    with limited():
        async with server.running():
            client = bench.network(2)
            async with client.running():
                await client.connect(server.multiaddrs[0])
                stream = await client.open_stream(server.peer_id, OTHER)
                await stream.send_all(b"goodbye")
                await stream.aclose()
                far = await inbox.streams.receive()
            assert await receive_all(far) == b"goodbye"


async def test_concurrent_streams_do_not_mix(bench: Workbench) -> None:
    async def exchange(client: Network, server: PeerId, number: int) -> None:
        payload = random.Random(number).randbytes(20_000)
        stream = await client.open_stream(server, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, payload)
            assert await receive_exactly(stream, len(payload)) == payload
        await stream.aclose()

    with limited(20):
        async with bench.running(2, serve_echo) as (server, client), trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(exchange, client, server.peer_id, number)


async def test_large_transfer_is_exact_in_both_directions(bench: Workbench) -> None:
    size = 64 << 20 if bench.kind == "libp2p" else 8 << 20
    block = random.Random(2).randbytes(1 << 20)

    async def send(stream: Stream) -> None:
        for _ in range(size // len(block)):
            await stream.send_all(block)

    async def check(stream: Stream) -> None:
        digest, left = hashlib.sha256(), size
        while left:
            chunk = await stream.receive_some(min(left, 1 << 20))
            assert chunk
            digest.update(chunk)
            left -= len(chunk)
        assert digest.digest() == expected

    expected = hashlib.sha256(block * (size // len(block))).digest()
    with limited(60):
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            async with trio.open_nursery() as nursery:
                for stream in (near, far):
                    nursery.start_soon(send, stream)
                    nursery.start_soon(check, stream)


async def test_slow_reader_applies_backpressure(bench: Workbench) -> None:
    payload = random.Random(3).randbytes(4 << 20)
    sent = trio.Event()

    async def send(stream: Stream) -> None:
        await stream.send_all(payload)
        sent.set()

    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, near)
                with trio.move_on_after(0.3):
                    await sent.wait()
                assert not sent.is_set()
                assert await receive_exactly(far, len(payload)) == payload
                await sent.wait()


async def test_cancelled_receive_loses_no_bytes(bench: Workbench) -> None:
    payload = random.Random(4).randbytes(300_000)
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)

            async def trickle() -> None:
                for start in range(0, len(payload), 3000):
                    await near.send_all(payload[start : start + 3000])

            received = bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trickle)
                while len(received) < len(payload):
                    with trio.move_on_after(0.0002):
                        received += await far.receive_some(1000)
            assert received == payload


async def test_cancelled_send_resets_only_its_stream(bench: Workbench) -> None:
    with limited():
        async with bench.running(2, serve_echo) as networks:
            server, client = networks
            near, far = await open_pair(networks)
            neighbour = await client.open_stream(server.peer_id, ECHO)
            with trio.move_on_after(0.2) as scope:
                await near.send_all(bytes(8 << 20))
            assert scope.cancelled_caught
            with pytest.raises(StreamClosed):
                await near.send_all(b"more")
            with pytest.raises(StreamClosed):
                await receive_all(far)
            await neighbour.send_all(b"still here")
            assert await receive_exactly(neighbour, 10) == b"still here"


async def test_send_cancelled_before_start_keeps_stream(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            with trio.CancelScope() as scope:
                scope.cancel()
                await near.send_all(b"never")
            assert scope.cancelled_caught
            await near.send_all(b"once")
            assert await receive_exactly(far, 4) == b"once"


async def test_concurrent_sends_raise_busy(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, _ = await open_pair(networks)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.send_all, bytes(8 << 20))
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await near.send_all(b"me too")
                nursery.cancel_scope.cancel()


async def test_reset_breaks_stream_at_other_end(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            await near.send_all(b"half a mess")
            await near.reset()
            with pytest.raises(StreamClosed):
                await receive_all(far)
            with pytest.raises(StreamClosed):
                await near.receive_some()
            with pytest.raises(StreamClosed):
                await near.send_all(b"more")


async def test_close_ends_both_directions_and_is_idempotent(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            await near.aclose()
            await near.aclose()
            for operation in (near.receive_some(), near.send_all(b"x")):
                with pytest.raises(StreamClosed):
                    await operation
            assert await far.receive_some() == b""
            with pytest.raises(StreamClosed):
                await send_for_ever(far)


async def test_close_works_when_cancelled(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            await near.send_all(b"bye")
            with trio.CancelScope() as scope:
                scope.cancel()
                await near.aclose()
            assert await receive_all(far) == b"bye"


async def test_close_wakes_local_reader(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, _ = await open_pair(networks)

            async def wait() -> None:
                with pytest.raises(StreamClosed):
                    await near.receive_some()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                await near.aclose()


async def test_failing_handler_resets_only_its_stream(bench: Workbench) -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive_some()
        raise RuntimeError("a defect of the handler")

    def prepare(network: Network) -> None:
        serve_echo(network)
        network.set_stream_handler(OTHER, fail)

    with limited():
        async with bench.running(2, prepare) as (server, client):
            stream = await client.open_stream(server.peer_id, OTHER)
            await stream.send_all(b"x")
            with pytest.raises(StreamClosed):
                await receive_all(stream)
            healthy = await client.open_stream(server.peer_id, ECHO)
            await healthy.send_all(b"alive")
            assert await receive_exactly(healthy, 5) == b"alive"


async def test_exception_in_running_block_is_not_grouped(bench: Workbench) -> None:
    network = bench.network(1)
    with pytest.raises(KeyError):
        async with network.running():
            raise KeyError("the body's own")


# Connections


async def test_dial_error_gives_the_reason(bench: Workbench) -> None:
    with limited(15):
        async with bench.running(2) as (server, client):
            stranger = bench.network(99)
            async with stranger.running():
                address = stranger.multiaddrs[0]
            with pytest.raises(NetworkError, match="refused"):
                await client.connect(address)
            with pytest.raises(NetworkError, match="no address of the peer is known"):
                await client.open_stream(bench.peer_id(98), ECHO)
            with pytest.raises(NetworkError, match="/p2p/"):
                await client.connect("/ip4/127.0.0.1/tcp/4001")
            with pytest.raises(NetworkError, match="multiaddr"):
                await client.connect("nonsense")
            with pytest.raises(NetworkError, match="itself"):
                await client.connect(client.multiaddrs[0])
            wrong = server.multiaddrs[0].replace(server.peer_id, bench.peer_id(97))
            with pytest.raises(NetworkError, match=f"cannot reach {bench.peer_id(97)}"):
                await client.connect(wrong)


async def test_unreachable_peer_is_dialled_again_without_backoff(bench: Workbench) -> None:
    late = bench.network(99)
    async with late.running():
        address = late.multiaddrs[0]
    port = address.split("/")[4]
    with limited():
        async with bench.running(1) as (client,):
            with pytest.raises(NetworkError):
                await client.connect(address)
            if bench.kind == "libp2p":
                from node.network.host import Libp2pNetwork

                late = Libp2pNetwork((99).to_bytes(32, "big"), listen=[f"/ip4/127.0.0.1/tcp/{port}"])
            async with late.running():
                assert await client.connect(late.multiaddrs[0]) == late.peer_id


async def test_open_stream_dials_known_addresses(bench: Workbench) -> None:
    server, client = bench.network(1), bench.network(2)
    serve_echo(server)
    with limited():
        async with server.running(), client.running():
            client.add_addresses(server.peer_id, ["garbage", *server.multiaddrs, "/ip4/1.2.3.4/udp/1"])
            assert client.addresses_of(server.peer_id) == server.multiaddrs
            assert client.connected_peers() == ()
            stream = await client.open_stream(server.peer_id, ECHO)
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"
            assert client.connected_peers() == (server.peer_id,)


async def test_unserved_protocol_is_refused(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as (server, client):
            with pytest.raises(NetworkError, match="/test/unknown"):
                await client.open_stream(server.peer_id, "/test/unknown")


async def test_connection_events_are_reported_once(bench: Workbench) -> None:
    server, client = bench.network(1), bench.network(2)
    with limited():
        async with server.running(), client.running(), server.events() as events, client.events() as ours:
            await client.connect(server.multiaddrs[0])
            await client.connect(server.multiaddrs[0])
            assert await anext(events) == PeerConnected(client.peer_id)
            assert await anext(ours) == PeerConnected(server.peer_id)
            await client.disconnect(server.peer_id)
            assert await anext(events) == PeerDisconnected(client.peer_id)
            assert await anext(ours) == PeerDisconnected(server.peer_id)
            assert client.connected_peers() == server.connected_peers() == ()
            await client.connect(server.multiaddrs[0])
            assert await anext(events) == PeerConnected(client.peer_id)


async def test_disconnect_breaks_streams_on_both_sides(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as networks:
            near, far = await open_pair(networks)
            await networks[1].disconnect(networks[0].peer_id)
            for stream in (near, far):
                with pytest.raises(StreamClosed):
                    await stream.receive_some()


async def test_stopped_peer_breaks_streams_and_is_reported(bench: Workbench) -> None:
    server, client = bench.network(1), bench.network(2)
    inbox = Inbox()
    server.set_stream_handler(OTHER, inbox)
    with limited():
        async with server.running(), server.events() as events:
            async with client.running():
                await client.connect(server.multiaddrs[0])
                await client.open_stream(server.peer_id, OTHER)
                far = await inbox.streams.receive()
                assert await anext(events) == PeerConnected(client.peer_id)
            with pytest.raises(StreamClosed):
                await far.receive_some()
            assert await anext(events) == PeerDisconnected(client.peer_id)


async def test_ping_measures_round_trip(bench: Workbench) -> None:
    with limited():
        async with bench.running(2) as (server, client):
            assert 0 < await client.ping(server.peer_id) < 1
            with pytest.raises(NetworkError):
                await client.ping(bench.peer_id(98))


async def test_operations_fail_while_not_running(bench: Workbench) -> None:
    network = bench.network(1)
    network.join_topic(TOPIC, lambda peer, data: True)
    address = f"/ip4/127.0.0.1/tcp/4001/p2p/{bench.peer_id(2)}"

    async def refuses() -> None:
        assert network.multiaddrs == ()
        for operation in (network.connect(address), network.publish(TOPIC, b""), network.provide(bytes(32))):
            with pytest.raises(NetworkError, match="not running"):
                await operation

    with limited():
        await refuses()
        async with network.running():
            assert network.multiaddrs
        await refuses()


async def test_subscriptions_end_when_network_stops(bench: Workbench) -> None:
    network = bench.network(1)
    network.join_topic(TOPIC, lambda peer, data: True)
    with limited():
        async with network.subscribe(TOPIC) as messages, network.events() as events:
            async with network.running():
                pass
            assert [message async for message in messages] == []
            assert [event async for event in events] == []


# Gossip


def gossiping(network: Network) -> None:
    def validate(peer: PeerId, data: bytes) -> bool:
        if data == b"explode":
            raise ValueError("a defect of the validator")
        return data != b"bad"

    network.join_topic(TOPIC, validate)


async def hear(subscriber: Network, publisher: Network, data: bytes) -> GossipMessage:
    """Publish until it is heard: there is no promise that the first message arrives."""
    async with subscriber.subscribe(TOPIC) as messages:
        while True:
            await publisher.publish(TOPIC, data)
            with trio.move_on_after(0.25):
                return await anext(messages)


async def test_gossip_reaches_peers_beyond_direct_neighbours(bench: Workbench) -> None:
    with limited(20):
        async with bench.running(3, gossiping) as (_, publisher, listener):
            message = await hear(listener, publisher, b"news")
            assert message == GossipMessage(publisher.peer_id, b"news")


async def test_gossip_refused_by_validator_is_not_delivered(bench: Workbench) -> None:
    with limited(20):
        async with bench.running(2, gossiping) as (listener, publisher):
            await hear(listener, publisher, b"warm up")
            async with listener.subscribe(TOPIC) as messages:
                for data in (b"bad", b"explode", b"good"):
                    await publisher.publish(TOPIC, data)
                heard = await anext(messages)
                while heard.data == b"warm up":
                    heard = await anext(messages)
                assert heard.data == b"good"


async def test_gossip_is_not_echoed_to_its_publisher(bench: Workbench) -> None:
    with limited(20):
        async with bench.running(2, gossiping) as (listener, publisher), publisher.subscribe(TOPIC) as own:
            await hear(listener, publisher, b"from publisher")
            await listener.publish(TOPIC, b"from listener")
            assert (await anext(own)).source == listener.peer_id


async def test_gossip_flows_both_ways_after_reconnection(bench: Workbench) -> None:
    with limited(30):
        async with bench.running(2, gossiping) as (one, other):
            await hear(one, other, b"before")
            await hear(other, one, b"before")
            await other.disconnect(one.peer_id)
            await other.connect(one.multiaddrs[0])
            for number in range(2):
                await hear(one, other, b"after %d" % number)
                await hear(other, one, b"after %d" % number)


async def test_gossip_size_and_topic_are_checked(bench: Workbench) -> None:
    with limited():
        async with bench.running(1, gossiping) as (network,):
            with pytest.raises(NetworkError, match="65536"):
                await network.publish(TOPIC, bytes(65537))
            with pytest.raises(NetworkError, match="not joined"):
                await network.publish("other", b"")
            with pytest.raises(NetworkError, match="not joined"):
                async with network.subscribe("other"):
                    pass


# DHT: the value is a decimal sequence number, and the highest wins


def keeping_records(network: Network) -> None:
    def newest(key: str, values: Sequence[bytes]) -> int:
        return max(range(len(values)), key=lambda index: int(values[index]))

    network.register_record("metaswarm", lambda key, value: int(value) >= 0, newest)


KEY = "/metaswarm/span/" + "0" * 64 + "/12D3KooWGs41cbzKXjX8pwMXi2ZqJRn52DUhSvRhF4FKx2Qwh7qV"


async def test_dht_record_is_found_by_others(bench: Workbench) -> None:
    with limited():
        async with bench.running(3, keeping_records) as (_, writer, reader):
            assert await reader.get_record(KEY) is None
            await writer.put_record(KEY, b"1")
            assert await reader.get_record(KEY) == b"1"


async def test_dht_lookup_prefers_newer_record_to_local_copy(bench: Workbench) -> None:
    with limited():
        async with bench.running(3, keeping_records) as (_, writer, reader):
            await writer.put_record(KEY, b"1")
            assert await reader.get_record(KEY) == b"1"
            await writer.put_record(KEY, b"2")
            assert await reader.get_record(KEY) == b"2"


async def test_dht_older_record_does_not_replace_newer(bench: Workbench) -> None:
    with limited():
        async with bench.running(3, keeping_records) as (_, writer, reader):
            await writer.put_record(KEY, b"5")
            with pytest.raises(NetworkError, match="newer"):
                await writer.put_record(KEY, b"4")
            assert await reader.get_record(KEY) == b"5"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(KEY, b"-1", id="refused by the validator"),
        pytest.param(KEY, b"not a number", id="makes the validator raise"),
        pytest.param(KEY, bytes(MAX_RECORD_BYTES + 1), id="too long"),
        pytest.param("/elsewhere/x", b"1", id="of another namespace"),
        pytest.param("no slashes", b"1", id="no key"),
    ],
)
async def test_dht_invalid_record_is_refused(bench: Workbench, key: str, value: bytes) -> None:
    with limited():
        async with bench.running(2, keeping_records) as (_, writer):
            with pytest.raises(NetworkError):
                await writer.put_record(key, value)


async def test_dht_providers_are_distinct_exclude_self_and_can_be_dialled(bench: Workbench) -> None:
    content = hashlib.sha256(b"content").digest()
    with limited():
        async with bench.running(4, serve_echo) as (_, first, second, seeker):
            for provider in (first, second, seeker, first):
                await provider.provide(content)
            found = await seeker.find_providers(content)
            assert sorted(found) == sorted([first.peer_id, second.peer_id])
            assert len(await seeker.find_providers(content, limit=1)) == 1
            stream = await seeker.open_stream(first.peer_id, ECHO)
            await stream.send_all(b"got you")
            assert await receive_exactly(stream, 7) == b"got you"


async def test_dht_peer_provides_many_contents(bench: Workbench) -> None:
    contents = [hashlib.sha256(bytes([number])).digest() for number in range(30)]
    with limited(30):
        async with bench.running(2) as (seeker, provider):
            for content in contents:
                await provider.provide(content)
            for content in contents:
                assert await seeker.find_providers(content) == (provider.peer_id,)
