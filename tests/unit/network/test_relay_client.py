"""At which relays a node keeps reservations, and for how long."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.network import relay_client
from node.network.addresses import address_range
from node.network.guarded_host import GuardedHost
from node.network.relay_client import RELAYS, HeldReservation, RelayClient
from node.network.relay_messages import HopMessage, HopType, Reservation, Status
from node.network.yamux import Yamux
from protocol.identity import PeerId


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


async def reservation(address: str, told: list[str], *, left_s: int = 3600, seen_at: str = "") -> RelayClient:
    """Return a client that has asked one relay, which was dialled at a host."""
    answer = HopMessage(
        type=HopType.STATUS,
        status=Status.OK,
        reservation=Reservation(
            expire=int(time.time()) + left_s, addrs=tuple(Multiaddr(each).to_bytes() for each in told)
        ),
    )

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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relay_client, "MessageStream", lambda stream: stream)
        host = SimpleNamespace(open_stream_on=open_stream_on, get_id=lambda: ID(b"\x00\x24" + bytes(36)))
        client = RelayClient(cast("GuardedHost", host), lambda: True, lambda: None, lambda: {seen_at})
        connection = cast("Any", SimpleNamespace(muxed_conn=Connection(address, 0.1)))
        client._candidates = lambda: {PeerId("relay"): connection}  # type: ignore[method-assign]
        await client._turn(trio.current_time())
    return client


async def test_circuits_are_announced_only_where_the_relay_was_dialled() -> None:
    told = ["/ip4/9.9.9.2/tcp/4001", "/ip4/7.7.7.7/tcp/443"]
    client = await reservation("9.9.9.1", told)
    assert {each.host for each in client.circuits()} == {"9.9.9.1", "9.9.9.2"}
    # Beside us, behind the same NAT, of which only the relay's port is forwarded.
    client = await reservation("192.168.1.3", ["/ip4/8.8.8.8/tcp/4001", "/ip4/7.7.7.7/tcp/443"], seen_at="8.8.8.8")
    assert {each.host for each in client.circuits()} == {"192.168.1.3", "8.8.8.8"}


async def test_reservation_that_expires_at_once_is_a_refusal() -> None:
    for left_s in (-3600, 0, 30):
        client = await reservation("9.9.9.1", [], left_s=left_s)
        assert client.relays() == ()
        assert list(client._pauses) == ["relay"]


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
