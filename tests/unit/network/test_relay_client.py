"""At which relays a node keeps reservations, and for how long."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.network import relay_client
from node.network.addresses import AddressBook, address_range
from node.network.guarded_host import GuardedHost
from node.network.relay_client import ASSUMED_S, LIMITED_RENEWAL_S, MAX_LIMITED, RELAYS, HeldReservation, RelayClient
from node.network.relay_messages import HopMessage, HopType, Limit, Reservation, Status
from node.network.yamux import Yamux
from protocol.identity import PeerId

RELAY = PeerId("relay")


class Connection(Yamux):
    """One that we have opened."""

    def __init__(self, host: str, rtt_s: float) -> None:
        self._remote = host
        self._rtt_s = rtt_s

    def get_remote_address(self) -> tuple[str, int]:
        return self._remote, 4001

    def rtt(self) -> float:
        return self._rtt_s


class Client(RelayClient):
    """Asks peers that all agree."""

    def __init__(self, **hosts: tuple[str, float]) -> None:
        super().__init__(cast("GuardedHost", None), lambda: True, lambda: None)
        self._connections = {
            PeerId(peer): cast("Any", SimpleNamespace(muxed_conn=Connection(*at))) for peer, at in hosts.items()
        }

    def _candidates(self) -> dict[PeerId, Any]:
        return self._connections

    async def _reserve(self, peer: PeerId, connection: Any) -> None:
        found = address_range(connection.muxed_conn.host)
        self._held[peer] = HeldReservation((), found, 1e9, 1e9, limited=False)


async def reservation(
    address: str, told: list[str], *, left_s: int = 3600, seen_at: str = "", book: AddressBook | None = None
) -> RelayClient:
    """Return a client that has asked one relay, which was dialled at a host."""
    client = RelayClient(host(granted(told, left_s), book), lambda: True, lambda: None, lambda: {seen_at})
    connection = cast("Any", SimpleNamespace(muxed_conn=Connection(address, 0.1)))
    client._candidates = lambda: {RELAY: connection}  # type: ignore[method-assign]
    await client._turn(trio.current_time())
    return client


def granted(told: list[str], left_s: int = 3600, limit: Limit | None = None) -> HopMessage:
    expire, addrs = int(time.time()) + left_s, tuple(Multiaddr(each).to_bytes() for each in told)
    return HopMessage(
        type=HopType.STATUS, status=Status.OK, reservation=Reservation(expire=expire, addrs=addrs), limit=limit
    )


def host(answer: HopMessage, book: AddressBook | None = None) -> GuardedHost:
    """Return a host whose peers all answer the same."""

    class Answers:
        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def send(self, message: Any) -> None:
            await trio.lowlevel.checkpoint()

        async def receive(self, kind: type) -> HopMessage:
            await trio.lowlevel.checkpoint()
            return answer

    async def open_stream_on(*_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return Answers()

    swarm = SimpleNamespace(book=book or AddressBook())
    return cast(
        "GuardedHost",
        SimpleNamespace(open_stream_on=open_stream_on, get_id=lambda: ID(b"\x00\x24" + bytes(36)), swarm=swarm),
    )


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_client, "MessageStream", lambda stream: stream)


async def test_circuits_are_announced_only_where_the_relay_was_dialled() -> None:
    told = ["/ip4/9.9.9.2/tcp/4001", "/ip4/7.7.7.7/tcp/443"]
    client = await reservation("9.9.9.1", told)
    assert {each.host for each in client.circuits()} == {"9.9.9.1", "9.9.9.2"}
    # Beside us, behind the same NAT, of which only the relay's port is forwarded.
    client = await reservation("192.168.1.3", ["/ip4/8.8.8.8/tcp/4001", "/ip4/7.7.7.7/tcp/443"], seen_at="8.8.8.8")
    assert {each.host for each in client.circuits()} == {"192.168.1.3", "8.8.8.8"}


async def test_relay_with_two_kinds_of_addresses_is_announced_at_both_where_it_announces_them_itself() -> None:
    told, book = ["/ip6/2a00::9/tcp/4001", "/ip4/9.9.9.2/tcp/4001", "/ip4/7.7.7.7/tcp/443"], AddressBook()
    assert {each.host for each in (await reservation("2a00::1", told)).circuits()} == {"2a00::1", "2a00::9"}
    book.add(RELAY, ["/ip4/9.9.9.2/tcp/4001"])
    assert {each.host for each in (await reservation("2a00::1", told, book=book)).circuits()} == {"2a00::1", "9.9.9.2"}


async def test_reservation_is_held_for_a_while_where_the_clocks_differ(autojump_clock: trio.testing.MockClock) -> None:
    for left_s in (-3600, 0, 30):
        client = await reservation("9.9.9.1", [], left_s=left_s)
        now_s = trio.current_time()
        assert client.relays() == (RELAY,)
        assert now_s < client._held[RELAY].renew_at_s < client._held[RELAY].expires_at_s == now_s + ASSUMED_S
    held = (await reservation("9.9.9.1", [], left_s=100_000))._held[RELAY]
    assert held.renew_at_s <= trio.current_time() + 1800, "a relay keeps it for an hour"


async def test_reservations_with_limits_take_no_place_of_others_and_are_few(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limited = host(granted([], limit=Limit(duration=120, data=1 << 17)))
    client = RelayClient(limited, lambda: True, lambda: None)
    connections: dict[PeerId, Any] = {
        PeerId(f"relay-{number}"): SimpleNamespace(muxed_conn=Connection(f"9.9.{number}.9", 0.1)) for number in range(8)
    }
    client._candidates = lambda: connections  # type: ignore[method-assign]
    for _ in range(10):
        await client._turn(trio.current_time())
        await trio.sleep(1)
    assert len(client.relays()) == MAX_LIMITED
    assert len(client._pauses) == 1, "others are asked now and then"
    for number in (8, 9):
        client._host = host(granted([]))
        connections[PeerId(f"relay-{number}")] = SimpleNamespace(muxed_conn=Connection(f"8.8.{number}.8", 0.01))
        client._held = {peer: replace(each, renew_at_s=1e9) for peer, each in client._held.items()}
        await trio.sleep(LIMITED_RENEWAL_S)
        await client._turn(trio.current_time())
    assert client.relays() == client.unlimited() == ("relay-8", "relay-9")


async def test_second_relay_is_in_another_range_than_the_first() -> None:
    client = Client(near=("9.9.9.1", 0.01), beside=("9.9.9.2", 0.02), far=("8.8.8.8", 0.2))
    await client._turn(0.0)
    assert client.relays() == ("near", "far")
    assert len(client.relays()) == RELAYS


async def test_renewal_that_fails_ends_no_reservation(autojump_clock: trio.testing.MockClock) -> None:
    async def fail(*_: Any) -> None:
        raise trio.TooSlowError

    host = cast("GuardedHost", SimpleNamespace(open_stream_on=fail))
    client = RelayClient(host, lambda: True, lambda: None)
    relay, now_s = PeerId("relay"), trio.current_time()
    client._held[relay] = HeldReservation((), None, now_s, now_s + 100, limited=False)
    connection = cast("Any", SimpleNamespace(muxed_conn=Connection("9.9.9.9", 0.1)))
    client._candidates = lambda: {relay: connection}  # type: ignore[method-assign]
    await client._turn(now_s)
    assert client.relays() == (relay,)
    assert client._held[relay].renew_at_s > now_s
    await client._turn(now_s + 101)
    assert client.relays() == ()
