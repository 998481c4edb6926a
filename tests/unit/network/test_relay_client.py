"""At which relays a node keeps reservations, and for how long."""

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from node.network.addresses import address_range
from node.network.guarded_host import GuardedHost
from node.network.relay_client import RELAYS, HeldReservation, RelayClient
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
