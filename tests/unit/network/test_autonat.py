"""AutoNAT v2 over loopback: a server dials what it is asked to, and the client believes only what has arrived."""

import contextlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from libp2p.abc import INetConn, INetStream
from libp2p.peer.id import ID
from trio.testing import MockClock

from node.network.addresses import TcpAddress, parse_address
from node.network.autonat import (
    DIAL_DATA_BYTES,
    MAX_AT_ONCE_PER_ORIGIN,
    ORIGIN_REQUESTS_BURST,
    AutonatClient,
    AutonatServer,
)
from node.network.autonat_messages import (
    DIAL_BACK_PROTOCOL,
    DIAL_REQUEST_PROTOCOL,
    AutonatMessage,
    DialBack,
    DialBackResponse,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
)
from node.network.dial_rate_limit import DialRateLimit
from node.network.guarded_host import GuardedHost
from node.network.host import Libp2pNetwork
from node.network.message_stream import MessageStream
from node.network.own_addresses import OwnAddresses
from node.network.reachability_verdicts import VALID_S
from node.network.transport import Tcp
from node.network.traversal import RECHECK_S, REDIAL_ROUND_S, ROUNDS, Traversal, TraversalOptions
from node.network.yamux import Yamux
from node.util.token_bucket import Allowance
from protocol.announcements import Verdict
from protocol.identity import PeerId

from .conftest import limited, until

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY = "5a" * 32


def host(number: int, **arguments: Any) -> Libp2pNetwork:
    return Libp2pNetwork(number.to_bytes(32, "big"), listen=[LOOPBACK], **arguments)


def connection(network: Libp2pNetwork, peer: PeerId) -> INetConn:
    assert network._swarm is not None
    return network._swarm.live_connections(ID.from_base58(peer))[0]


async def check(client: Libp2pNetwork, server: Libp2pNetwork, address: str) -> bool | None:
    """Have a server dial an address of a client; return whether it was reached, None where nothing was dialled."""
    assert client._host is not None
    autonat = AutonatClient(client._host)
    client._host.set_stream_handler("/libp2p/autonat/2/dial-back", autonat.handle_dial_back)  # type: ignore[arg-type]
    found = await autonat.check(connection(client, server.peer_id), [parse_address(address)])
    return None if found is None else found[1]


async def test_server_tells_whether_an_address_can_be_dialled() -> None:
    for key in (None, KEY):
        client, server = host(1, swarm_key=key), host(2, swarm_key=key)
        with limited(20):
            async with client.running(), server.running():
                await client.connect(server.multiaddrs[0])
                own = client.multiaddrs[0].rpartition("/p2p/")[0]
                assert await check(client, server, own) is True
                assert await check(client, server, "/ip4/127.0.0.1/tcp/9") is False
                # Another peer answers there.
                assert await check(client, server, server.multiaddrs[0].rpartition("/p2p/")[0]) is False


@pytest.mark.parametrize("opens_another", [False, True], ids=["clients-connection", "earlier-connection"])
async def test_number_over_a_connection_that_was_there_before_is_no_success(opens_another: bool) -> None:
    client, liar = host(1), host(2)

    async def lie(stream: INetStream) -> None:
        async with MessageStream(stream) as messages:
            request = (await messages.receive(AutonatMessage)).dial_request
            assert request is not None
            assert liar._host is not None
            held = connection(liar, client.peer_id)
            async with MessageStream(await liar._host.open_stream_on(held, DIAL_BACK_PROTOCOL)) as back:
                await back.send(DialBack(nonce=request.nonce))
                with contextlib.suppress(Exception):
                    await back.receive(DialBackResponse)
            response = DialResponse(status=ResponseStatus.OK, addr_index=0, dial_status=DialStatus.OK)
            await messages.send(AutonatMessage(dial_response=response))

    with limited(20):
        async with client.running(), liar.running():
            assert liar._host is not None
            liar._host.set_stream_handler(DIAL_REQUEST_PROTOCOL, lie)  # type: ignore[arg-type]
            if opens_another:
                await liar.connect(client.multiaddrs[0])
                await until(lambda: client.connected_peers())
            else:
                await client.connect(liar.multiaddrs[0])
            assert await check(client, liar, "/ip4/127.0.0.1/tcp/9") is None


async def test_server_dials_no_private_address_but_the_clients_own() -> None:
    client, server = host(1), host(2)
    with limited(20):
        async with client.running(), server.running():
            await client.connect(server.multiaddrs[0])
            assert await check(client, server, "/ip4/10.1.2.3/tcp/4001") is None


async def test_server_limits_requests_of_one_machine_whatever_identities_it_has() -> None:
    clients, server = [host(1), host(3)], host(2)
    with limited(20):
        async with clients[0].running(), clients[1].running(), server.running():
            for client in clients:
                await client.connect(server.multiaddrs[0])
            burst = ORIGIN_REQUESTS_BURST
            answers = [await check(clients[n % 2], server, "/ip4/127.0.0.1/tcp/9") for n in range(burst + 2)]
            assert answers == [False] * burst + [None] * 2


async def test_server_dials_for_one_machine_a_few_times_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = host(1), host(2)
    dialling, release = [0], trio.Event()

    async def dial(self: AutonatServer, messages: MessageStream, request: DialRequest) -> DialResponse:
        dialling[0] += 1
        await release.wait()
        return DialResponse(status=ResponseStatus.OK, addr_index=0, dial_status=DialStatus.E_DIAL_ERROR)

    monkeypatch.setattr(AutonatServer, "_dial", dial)
    answers: list[bool | None] = []

    async def ask() -> None:
        answers.append(await check(client, server, "/ip4/127.0.0.1/tcp/9"))

    with limited(20):
        async with client.running(), server.running():
            await client.connect(server.multiaddrs[0])
            async with trio.open_nursery() as nursery:
                for _ in range(MAX_AT_ONCE_PER_ORIGIN + 1):
                    nursery.start_soon(ask)
                await until(lambda: answers == [None])
                assert dialling == [MAX_AT_ONCE_PER_ORIGIN]
                release.set()
    assert answers == [None, *[False] * MAX_AT_ONCE_PER_ORIGIN]


async def test_client_pays_for_dials_to_other_hosts_up_to_an_hourly_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.autonat.PAID", Allowance(per_s=0.0, burst=2.5 * DIAL_DATA_BYTES[0]))
    monkeypatch.setattr("node.network.autonat.DIAL_DATA_BYTES", (DIAL_DATA_BYTES[0],) * 2)
    client, server = host(1), host(2)

    async def dial_back(*_: Any) -> DialStatus:
        await trio.lowlevel.checkpoint()
        return DialStatus.E_DIAL_ERROR

    monkeypatch.setattr(AutonatServer, "_dial_back", dial_back)
    with limited(20):
        async with client.running(), server.running():
            await client.connect(server.multiaddrs[0])
            assert client._host is not None
            autonat = AutonatClient(client._host)
            over = connection(client, server.peer_id)
            answers = [await autonat.check(over, [HOME]) for _ in range(3)]
            assert answers == [(HOME, False), (HOME, False), None]


async def test_rounds_of_dial_backs_are_limited_however_often_something_changes(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    traversal = Traversal(TraversalOptions(), OwnAddresses(), private_swarm=False)
    rounds: list[float] = []

    async def check(client: Any) -> None:
        await trio.lowlevel.checkpoint()
        rounds.append(trio.current_time())
        traversal._changed.set()

    monkeypatch.setattr(traversal, "_check", check)
    with trio.move_on_after(600):
        await traversal._check_loop(cast("AutonatClient", None))
    assert ROUNDS.burst <= len(rounds) <= ROUNDS.burst + ROUNDS.per_s * 600


class Server(Yamux):
    """A connection to a peer that can be asked."""

    is_closed = False
    is_initiator = False

    def __init__(self, host: str) -> None:
        self._remote = host
        self.peer_id = ID(host.encode())

    def get_remote_address(self) -> tuple[str, int]:
        return self._remote, 4001


class Dialled(Server):
    """One that we opened."""

    is_initiator = True


HOME = parse_address("/ip4/8.8.8.8/tcp/4001")


class Asking:
    """A node that has others dial it; `answers`: what servers say, by their hosts."""

    def __init__(self, *servers: Server, known_ourselves: bool = True, **answers: bool) -> None:
        self.servers = list(servers)
        self.answers = answers
        self.asked: list[str] = []
        own = OwnAddresses([HOME.transport] if known_ourselves else [])
        self.traversal = Traversal(TraversalOptions(), own, private_swarm=False)
        swarm = SimpleNamespace(get_connections=lambda: [SimpleNamespace(muxed_conn=each) for each in self.servers])
        self.traversal._host = cast("GuardedHost", SimpleNamespace(swarm=swarm))

    async def check(self, connection: Any, addresses: list[TcpAddress]) -> tuple[TcpAddress, bool] | None:
        self.asked.append(connection.muxed_conn.host)
        answer = self.answers.get(connection.muxed_conn.host)
        return None if answer is None else (addresses[0], answer)

    async def round(self) -> list[str]:
        """Return who is asked in a round."""
        self.asked.clear()
        await self.traversal._check_address(cast("AutonatClient", self), HOME)
        return list(self.asked)

    def verdict(self) -> Verdict:
        return self.traversal._verdicts.of(HOME, trio.current_time())


async def test_servers_that_do_not_help_are_asked_in_turn_with_the_others(autojump_clock: MockClock) -> None:
    hosts = [f"9.9.{number}.9" for number in range(4)]
    node = Asking(*map(Server, hosts), known_ourselves=False, **dict.fromkeys(hosts[3:], False))
    first, second = await node.round(), await node.round()
    assert len(first) == 3
    assert {*first, *second} == set(hosts), "the next round asks the rest, and nobody again so soon"
    assert len(second) == 1
    assert node.verdict() is Verdict.PRIVATE


async def test_one_machine_under_many_identities_does_not_make_a_public_node_private(autojump_clock: MockClock) -> None:
    node = Asking(*(Server("9.9.9.9") for _ in range(3)), Server("7.7.7.7"), **{"9.9.9.9": False, "7.7.7.7": True})
    for _ in range(5):
        assert (await node.round()).count("9.9.9.9") <= 1
        node.servers += [Server("9.9.9.9") for _ in range(3)]
        await trio.sleep(RECHECK_S[Verdict.PUBLIC])
    assert node.verdict() is Verdict.PUBLIC
    del node.servers[3]  # who had reached us
    await trio.sleep(VALID_S)
    await node.round()
    assert node.verdict() is Verdict.UNKNOWN


async def test_servers_that_we_dialled_are_asked_first_and_those_that_reached_us_again_before_that_expires(
    autojump_clock: MockClock,
) -> None:
    strangers = [f"9.9.{number}.9" for number in range(3)]
    node = Asking(*map(Server, strangers), Dialled("7.7.7.7"), **dict.fromkeys(strangers, False), **{"7.7.7.7": True})
    assert await node.round() == ["7.7.7.7"]
    for number in range(3):
        node.servers.append(Dialled(f"6.6.{number}.6"))
    for _ in range(5):
        await trio.sleep(RECHECK_S[Verdict.PUBLIC])
        assert await node.round() == ["7.7.7.7"]
        assert node.verdict() is Verdict.PUBLIC


async def test_firewalled_node_takes_relays_and_is_none_though_one_range_alone_could_not_reach_it() -> None:
    node = Asking(Server("9.9.9.9"), **{"9.9.9.9": False})
    assert not node.traversal._wants_relays()
    assert node.traversal._is_relay()
    await node.round()
    assert node.traversal.verdict() is Verdict.UNKNOWN
    assert node.traversal._wants_relays()
    assert not node.traversal._is_relay()
    node.servers, node.answers = [Server("7.7.7.7")], {"7.7.7.7": True}
    await node.round()
    assert node.traversal._is_relay()
    assert not node.traversal._wants_relays()


async def test_peer_in_our_own_network_does_not_hide_where_others_see_us() -> None:
    node = Asking(known_ourselves=False)
    node.traversal._tcp = cast("Tcp", SimpleNamespace(maps_port=lambda remote: True))
    seen = [(Dialled("172.31.0.9"), "/ip4/172.31.0.5/tcp/4001"), (Server("9.9.9.9"), HOME.transport)]
    for connection, address in seen:
        node.traversal.record_observed(cast("INetConn", SimpleNamespace(muxed_conn=connection)), parse_address(address))
    assert node.traversal._candidates() == [HOME]


async def test_peers_behind_relays_are_dialled_again_ever_more_rarely_and_at_once_where_they_move(
    autojump_clock: MockClock,
) -> None:
    peer_id, dials, addresses = ID(b"peer"), list[float](), [HOME]

    async def dial_direct(peer_id: ID, addresses: Any, limit: DialRateLimit) -> bool:
        await trio.lowlevel.checkpoint()
        dials.append(trio.current_time())
        return limit.take(HOME, trio.current_time())

    swarm = SimpleNamespace(relayed_peers=lambda: [peer_id], dial_direct=dial_direct)
    traversal = Traversal(TraversalOptions(), OwnAddresses(), private_swarm=False)
    async with trio.open_nursery() as nursery:
        host = cast("GuardedHost", SimpleNamespace(swarm=swarm))
        nursery.start_soon(traversal._redial_loop, host, lambda peer_id: addresses)
        await trio.sleep(7200)
        assert dials[0] <= REDIAL_ROUND_S
        assert len(dials) < 20
        assert dials[-1] - dials[-2] > 400
        before = len(dials)
        while len(dials) == before:  # right after one of them the next is far
            await trio.sleep(1)
        addresses.append(parse_address("/ip4/8.8.4.4/tcp/4001"))
        before = len(dials)
        await trio.sleep(REDIAL_ROUND_S + 1)
        assert len(dials) == before + 1
        nursery.cancel_scope.cancel()


async def test_dial_back_leaves_no_connection_behind() -> None:
    client, server = host(1), host(2)
    with limited(20):
        async with client.running(), server.running():
            await client.connect(server.multiaddrs[0])
            await check(client, server, client.multiaddrs[0].rpartition("/p2p/")[0])
            await until(lambda: client.connected_peers() == (server.peer_id,))
