"""Relays over loopback: peers that listen on nothing are reached through circuits, within the relay's limits."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from libp2p.abc import INetConn, INetStream
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from node.network import hole_punch, transport, traversal
from node.network.addresses import TcpAddress, parse_address
from node.network.admission import HandshakeLimiter
from node.network.guarded_swarm import GuardedSwarm
from node.network.host import Libp2pNetwork
from node.network.interface import ByteCounts, NetworkError, Stream, Way
from node.network.message_stream import MessageStream
from node.network.protobuf import MalformedMessage
from node.network.relay_ledger import RelayLimits
from node.network.relay_messages import (
    DCUTR_PROTOCOL,
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HolePunch,
    HolePunchType,
    HopMessage,
    HopType,
    Peer,
    Status,
    StopMessage,
    StopType,
)
from node.network.transport import Tcp, bind
from node.network.traversal import Traversal, TraversalOptions
from node.network.yamux import Yamux
from node.util.token_bucket import Allowance
from protocol.announcements import Verdict
from protocol.identity import PeerId

from .conftest import echo, limited, receive_all, receive_exactly, until

ECHO = "/metaswarm/echo/1"
STRANGE = "/test/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY = "5a" * 32


def relay_host(number: int = 1, limits: RelayLimits | None = None, **arguments: Any) -> Libp2pNetwork:
    options = TraversalOptions(relay=limits or RelayLimits(), verdict=Verdict.PUBLIC)
    network = Libp2pNetwork(number.to_bytes(32, "big"), listen=[LOOPBACK], traversal=options, **arguments)
    network.set_stream_handler(ECHO, echo)
    return network


def hidden_host(number: int, protocol: str = ECHO, **arguments: Any) -> Libp2pNetwork:
    """A peer that nobody can dial."""
    options = TraversalOptions(verdict=Verdict.PRIVATE)
    network = Libp2pNetwork(number.to_bytes(32, "big"), listen=[], traversal=options, **arguments)
    network.set_stream_handler(protocol, echo)
    return network


@asynccontextmanager
async def reserved(*relays: Libp2pNetwork, hidden: Libp2pNetwork) -> AsyncIterator[None]:
    """Run relays and a hidden peer with a reservation at each."""
    async with AsyncExitStack() as stack:
        for network in (*relays, hidden):
            await stack.enter_async_context(network.running())
        for relay in relays:
            await hidden.connect(relay.multiaddrs[0])
        await until(lambda: hidden._traversal._relays and len(hidden._traversal._relays.relays()) == len(relays))
        yield


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "swarm-key"])
async def test_hidden_peer_is_reached_through_its_relay(key: str | None) -> None:
    relay, hidden, other = relay_host(swarm_key=key), hidden_host(2, swarm_key=key), hidden_host(3, swarm_key=key)
    with limited(20):
        async with reserved(relay, hidden=hidden), other.running():
            (address,) = hidden.multiaddrs
            assert address == f"{relay.multiaddrs[0]}/p2p-circuit/p2p/{hidden.peer_id}"
            await other.connect(address)
            assert other.way_to(hidden.peer_id) == hidden.way_to(other.peer_id) == Way(relay=relay.peer_id)
            stream = await other.open_stream(hidden.peer_id, ECHO)
            payload = bytes(range(256)) * 8000
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, payload)
                assert await receive_exactly(stream, len(payload)) == payload
            assert relay._traversal._relay is not None
            assert relay._traversal._relay.relayed_bytes > 2 * len(payload)


async def test_half_of_a_circuit_may_end_before_the_other() -> None:
    relay, hidden, other = relay_host(), hidden_host(2), hidden_host(3)

    async def count(stream: Stream) -> None:
        data = await receive_all(stream)
        await stream.send_all(str(len(data)).encode())

    hidden.set_stream_handler("/metaswarm/count/1", count)
    with limited(20):
        async with reserved(relay, hidden=hidden), other.running():
            await other.connect(hidden.multiaddrs[0])
            stream = await other.open_stream(hidden.peer_id, "/metaswarm/count/1")
            await stream.send_all(bytes(100_000))
            stream._muxed.close_now(discard=False)  # type: ignore[attr-defined]
            assert await receive_all(stream) == b"100000"


async def test_circuit_ends_with_its_relay_and_the_other_relay_takes_over() -> None:
    first, second, hidden, other = relay_host(1), relay_host(4), hidden_host(2), hidden_host(3)
    with limited(30):
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(reserved(first, second, hidden=hidden))
            await stack.enter_async_context(other.running())
            other.add_addresses(hidden.peer_id, hidden.multiaddrs)
            await other.ping(hidden.peer_id)
            way = other.way_to(hidden.peer_id)
            assert way is not None
            used = first if way.relay == first.peer_id else second
            rest = second if used is first else first
            assert used._swarm is not None
            for connection in used._swarm.get_connections():
                assert isinstance(connection.muxed_conn, Yamux)
                connection.muxed_conn.abort()
            # Nobody has noticed yet: the stream is opened on the old circuit first.
            assert other.way_to(hidden.peer_id) == way
            await other.ping(hidden.peer_id)
            assert other.way_to(hidden.peer_id) == Way(relay=rest.peer_id)


async def exchange(stream: Stream, times: int) -> None:
    for _ in range(times):
        await stream.send_all(bytes(4096))
        await receive_exactly(stream, 4096)


async def test_circuit_of_a_outsider_is_reset_at_its_limit() -> None:
    relay = relay_host(limits=RelayLimits(outsider_bytes=20_000))
    hidden, other = hidden_host(2, STRANGE), hidden_host(3, STRANGE)
    with limited(20):
        async with reserved(relay, hidden=hidden), other.running():
            assert hidden.reachability.relays == ()  # nobody plans a job with so few bytes
            await other.connect(hidden.multiaddrs[0])
            stream = await other.open_stream(hidden.peer_id, STRANGE)
            with pytest.raises(NetworkError):
                await exchange(stream, 20)
            await until(lambda: other.way_to(hidden.peer_id) is None)


async def test_circuit_that_carries_nothing_is_reset() -> None:
    relay, hidden, other = relay_host(), hidden_host(2), hidden_host(3)
    with limited(20):
        async with reserved(relay, hidden=hidden), other.running():
            await other.connect(hidden.multiaddrs[0])
            server = relay._traversal._relay
            assert server is not None
            assert server.ledger.circuits == 1
            server._limits = RelayLimits(idle_s=0.1)  # not before: however long the machine took to connect
            with suppress(NetworkError):  # the limit counts from what is carried next
                await other.ping(hidden.peer_id)
            await until(lambda: server.ledger.circuits == 0)
            await until(lambda: hidden.way_to(other.peer_id) is None)


async def test_relay_refuses_what_nobody_reserved_and_never_dials() -> None:
    relay, hidden, other = relay_host(), hidden_host(2), hidden_host(3)
    public = relay_host(5)
    with limited(20):
        async with reserved(relay, hidden=hidden), other.running(), public.running():
            relay.add_addresses(public.peer_id, public.multiaddrs)
            with pytest.raises(NetworkError, match="no reservation"):
                await other.connect(f"{relay.multiaddrs[0]}/p2p-circuit/p2p/{public.peer_id}")
            assert public.peer_id not in relay.connected_peers()


async def test_circuits_cost_the_peer_behind_a_relay_no_more_handshakes_than_a_rate_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[str] = []

    async def wait_turn(self: HandshakeLimiter, host: str) -> None:
        turns.append(host)
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(HandshakeLimiter, "wait_turn", wait_turn)
    limits = RelayLimits(requests=Allowance(per_s=0.001, burst=2))
    relay, hidden, other = relay_host(limits=limits), hidden_host(2), hidden_host(3)
    with limited(20):
        async with reserved(relay, hidden=hidden), other.running():
            for _ in range(2):
                await other.connect(hidden.multiaddrs[0])
                await other.disconnect(hidden.peer_id)
                await until(lambda: hidden.way_to(other.peer_id) is None)
            assert turns.count(f"relay {relay.peer_id}") == 2
            with pytest.raises(NetworkError, match="as many circuits"):
                await other.connect(hidden.multiaddrs[0])


async def test_node_that_is_seen_behind_a_nat_has_relays_before_anybody_tried_to_dial_it() -> None:
    relay, home = relay_host(), Libp2pNetwork((2).to_bytes(32, "big"), listen=[LOOPBACK])
    with limited(20):
        async with relay.running(), home.running():
            await home.connect(relay.multiaddrs[0])
            assert home._swarm is not None
            assert not home._traversal._wants_relays()
            (connection,) = home._swarm.live_connections(ID.from_base58(relay.peer_id))
            # Over loopback it left from another port: which port of the NAT is ours it does not tell.
            home._traversal.record_observed(connection, parse_address("/ip4/8.8.8.8/tcp/50000"))
            held = home._traversal._relays
            assert held is not None
            await until(lambda: held.relays() == (relay.peer_id,))
            assert home.reachability.observed == ()


async def test_endpoint_dialled_from_another_port_once_shows_our_own_when_dialled_from_it() -> None:
    async with trio.open_nursery() as nursery:
        bound = {"": await bind(parse_address(LOOPBACK))}
        tcp = Tcp(nursery, bound, 8, ByteCounts())
        (listener,) = await bind(parse_address(LOOPBACK))
        remote = listener.socket.getsockname()
        tcp._unmapped[remote] = None
        assert not tcp.maps_port(remote)
        stream = await tcp.connect_from_port(parse_address(f"/ip4/{remote[0]}/tcp/{remote[1]}"))
        assert tcp.maps_port(remote)
        await stream.close()
        for each in (listener, *bound[""]):
            await each.aclose()


async def test_dial_that_is_not_answered_is_tried_from_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FROM_PORT_TIMEOUT_S", 0.01)
    monkeypatch.setattr(TcpAddress, "is_public", True)

    async def connect_from_port(self: Tcp, address: TcpAddress) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Tcp, "connect_from_port", connect_from_port)
    async with trio.open_nursery() as nursery:
        tcp = Tcp(nursery, {}, 8, ByteCounts())
        (listener,) = await bind(parse_address(LOOPBACK))
        remote = listener.socket.getsockname()
        with limited(5):
            stream = await tcp._connect(parse_address(f"/ip4/{remote[0]}/tcp/{remote[1]}"))
        assert not tcp.maps_port(remote)
        await stream.close()
        await listener.aclose()


async def test_waiting_for_peers_that_nobody_identifies_leaves_nothing_behind() -> None:
    relay = relay_host()
    async with relay.running():
        assert relay._host is not None
        for number in range(3):
            with trio.move_on_after(0.01):
                await relay._host.wait_identified(ID.from_base58(hidden_host(9 + number).peer_id))
        assert not relay._host._identified


async def test_peer_that_connects_again_tells_again_how_it_sees_this_node() -> None:
    server, client = relay_host(1), hidden_host(2)
    with limited(20):
        async with server.running(), client.running():
            observed = server._traversal._observed
            address = parse_address(server.multiaddrs[0].rpartition("/p2p/")[0])
            for _ in range(2):
                await client.connect(server.multiaddrs[0])
                await until(lambda: observed.observers(address))
                await client.disconnect(server.peer_id)
                await until(lambda: not observed.observers(address) and not server.connected_peers())


async def test_peer_without_relay_option_does_not_relay() -> None:
    options = TraversalOptions(relay=None, verdict=Verdict.PUBLIC)
    plain = Libp2pNetwork((1).to_bytes(32, "big"), listen=[LOOPBACK], traversal=options)
    hidden = hidden_host(2)
    with limited(20):
        async with plain.running(), hidden.running():
            await hidden.connect(plain.multiaddrs[0])
            await until(lambda: bool(hidden._traversal._relays and hidden._traversal._relays._pauses))
            assert hidden.reachability.relays == ()
            assert hidden.multiaddrs == ()


async def test_relay_tells_malformed_requests_and_keeps_the_answers_of_the_peers_behind_it() -> None:
    relay, hidden, other = relay_host(), hidden_host(2), hidden_host(3)

    async def refuse(stream: INetStream) -> None:
        async with MessageStream(stream) as messages:
            await messages.receive(StopMessage)
            await messages.send(StopMessage(type=StopType.CONNECT, status=Status.OK))

    async def status(message: HopMessage) -> Status | None:
        assert other._host is not None
        assert other._swarm is not None
        (connection,) = other._swarm.live_connections(ID.from_base58(relay.peer_id))
        async with MessageStream(await other._host.open_stream_on(connection, HOP_PROTOCOL)) as messages:
            await messages.send(message)
            return (await messages.receive(HopMessage)).status

    with limited(20):
        async with reserved(relay, hidden=hidden), other.running():
            await other.connect(relay.multiaddrs[0])
            assert hidden._host is not None
            hidden._host.set_stream_handler(STOP_PROTOCOL, refuse)  # type: ignore[arg-type]
            target = Peer(id=ID.from_base58(hidden.peer_id).to_bytes())
            assert await status(HopMessage(type=HopType.CONNECT, peer=target)) is Status.CONNECTION_FAILED
            assert await status(HopMessage()) is Status.MALFORMED_MESSAGE
            assert await status(HopMessage(type=HopType.STATUS)) is Status.UNEXPECTED_MESSAGE
            assert relay._traversal._relay is not None
            assert relay._traversal._relay.ledger.reserved(trio.current_time()) == (hidden.peer_id,)


async def test_reservation_ends_with_the_last_direct_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    relay = relay_host()
    ended: list[PeerId] = []
    monkeypatch.setattr(relay._traversal, "disconnected", ended.append)
    peer, direct = ID.from_base58(hidden_host(2).peer_id), [True]
    connections = SimpleNamespace(
        live_connections=lambda _: ["a circuit"], direct_connection=lambda _: direct[0] or None
    )
    relay._swarm = cast("GuardedSwarm", connections)
    relay._connected[PeerId(peer.to_base58())] = None
    relay._on_disconnected(peer)
    assert ended == []
    direct[0] = False
    relay._on_disconnected(peer)
    assert ended == [peer.to_base58()]
    assert relay.connected_peers() == (peer.to_base58(),)


async def test_reservation_ends_with_the_connection() -> None:
    relay, hidden = relay_host(), hidden_host(2)
    with limited(20):
        async with reserved(relay, hidden=hidden):
            assert relay._traversal._relay is not None
            ledger = relay._traversal._relay.ledger
            assert ledger.reserved(trio.current_time()) == (hidden.peer_id,)
            await hidden.disconnect(relay.peer_id)
            await until(lambda: not ledger.reserved(trio.current_time()))
            await until(lambda: not hidden.reachability.relays)
            assert hidden.multiaddrs == ()


async def test_hole_punching_is_served_on_circuits_of_our_own_and_not_again_after_a_failure() -> None:
    relay, hidden, other = relay_host(), hidden_host(2), hidden_host(3)

    async def is_served(client: Libp2pNetwork, server: Libp2pNetwork) -> bool:
        assert client._host is not None
        assert client._swarm is not None
        (circuit,) = client._swarm.live_connections(ID.from_base58(server.peer_id))
        async with MessageStream(await client._host.open_stream_on(circuit, DCUTR_PROTOCOL)) as messages:
            with suppress(MuxedStreamError, MalformedMessage):
                await messages.send(HolePunch(type=HolePunchType.CONNECT))
                return (await messages.receive(HolePunch)).type is HolePunchType.CONNECT
        return False

    with limited(20):
        async with reserved(relay, hidden=hidden), other.running():
            await other.connect(hidden.multiaddrs[0])
            opener, reached = other._traversal._puncher, hidden._traversal._puncher
            assert opener is not None
            assert reached is not None
            await until(lambda: opener._failed and not opener._busy and not reached._busy)
            assert not await is_served(hidden, other)  # it has just failed
            opener._failed.clear()
            assert await is_served(hidden, other)
            reached._failed.clear()
            assert not await is_served(other, hidden)  # which has not opened the circuit


@asynccontextmanager
async def punchable(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Libp2pNetwork, Libp2pNetwork]]:
    """Run two peers with reservations at one relay that can be dialled, as behind a NAT, only while they dial, too."""
    monkeypatch.setattr(hole_punch, "is_target", lambda address: True)
    dial = GuardedSwarm._dial_addr_single_attempt
    behind_nats: set[str] = set()

    async def dial_others(self: GuardedSwarm, address: Multiaddr, peer_id: ID) -> INetConn:
        if str(address).partition("/p2p/")[0] in behind_nats:
            raise OpenConnectionError("the packet was dropped")
        return await dial(self, address, peer_id)

    monkeypatch.setattr(GuardedSwarm, "_dial_addr_single_attempt", dial_others)
    options = TraversalOptions(verdict=Verdict.PRIVATE)
    relay = relay_host()
    one, two = (Libp2pNetwork(each.to_bytes(32, "big"), listen=[LOOPBACK], traversal=options) for each in (2, 3))
    async with reserved(relay, hidden=one), two.running():
        for network in (one, two):
            network.set_stream_handler(ECHO, echo)
            (own,) = (each.rpartition("/p2p/")[0] for each in network.multiaddrs if "p2p-circuit" not in each)
            network._traversal._observed.record(PeerId("observer"), "9.9.9.9", parse_address(own))
            behind_nats.add(own)
        await two.connect(relay.multiaddrs[0])
        await until(lambda: any("p2p-circuit" in each for each in two.multiaddrs))
        yield one, two


def circuit_to(network: Libp2pNetwork) -> str:
    return next(each for each in network.multiaddrs if "p2p-circuit" in each)


async def test_circuit_is_upgraded_to_a_direct_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_by: defaultdict[PeerId, set[PeerId]] = defaultdict(set)

    def record(self: Traversal, connection: INetConn, address: TcpAddress) -> None:
        assert self._host is not None
        own = PeerId(self._host.get_id().to_base58())
        seen_by[own].add(PeerId(connection.muxed_conn.peer_id.to_base58()))

    monkeypatch.setattr(Traversal, "record_observed", record)
    with limited(20):
        async with punchable(monkeypatch) as (one, two):
            await two.connect(circuit_to(one))
            await until(lambda: two.way_to(one.peer_id) == one.way_to(two.peer_id) == Way(punched=True))
            stream = await two.open_stream(one.peer_id, ECHO)
            await stream.send_all(b"direct")
            assert await receive_exactly(stream, 6) == b"direct"

            def circuits(network: Libp2pNetwork, peer: PeerId) -> list[object]:
                assert network._swarm is not None
                live = network._swarm.live_connections(ID.from_base58(peer))
                return [one for one in live if isinstance(one.muxed_conn, Yamux) and one.muxed_conn.relay]

            await until(lambda: not circuits(one, two.peer_id) and not circuits(two, one.peer_id))
            # First met over a circuit, where nobody sees anybody: each tells the other over the new connection.
            await until(lambda: seen_by[one.peer_id] >= {two.peer_id} and seen_by[two.peer_id] >= {one.peer_id})


async def test_of_two_peers_that_both_begin_to_upgrade_one_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    both = trio.Event()
    begun: set[GuardedSwarm] = set()

    async def dial_direct(self: GuardedSwarm, *_: object) -> bool:
        begun.add(self)
        if len(begun) == 2:
            both.set()
        await both.wait()
        return False

    monkeypatch.setattr(GuardedSwarm, "dial_direct", dial_direct)
    monkeypatch.setattr(traversal, "REDIAL_ROUND_S", 5.0)  # on a busy machine the exchange may come to nothing
    with limited(30):
        async with punchable(monkeypatch) as (one, two), trio.open_nursery() as nursery:
            nursery.start_soon(two.connect, circuit_to(one))
            nursery.start_soon(one.connect, circuit_to(two))
            await until(lambda: two.way_to(one.peer_id) == one.way_to(two.peer_id) == Way(punched=True))


async def test_upgrade_that_came_to_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traversal, "REDIAL_ROUND_S", 0.1)
    monkeypatch.setattr(traversal, "REDIAL_BACKOFF_S", (0.1, 0.1))
    serve, refused = hole_punch.HolePuncher.handle, list[str]()

    async def refuse_once(self: hole_punch.HolePuncher, stream: INetStream) -> None:
        if not refused:
            refused.append("as one that has dialled enough for the moment")
            raise hole_punch.Rationed
        await serve(self, stream)

    monkeypatch.setattr(hole_punch.HolePuncher, "handle", refuse_once)
    with limited(20):
        async with punchable(monkeypatch) as (one, two):
            await two.connect(circuit_to(one))
            await until(lambda: two.way_to(one.peer_id) == one.way_to(two.peer_id) == Way(punched=True))
    assert refused
