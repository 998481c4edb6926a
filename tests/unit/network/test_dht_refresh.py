"""When the routing table of the DHT is refreshed."""

from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from node.network.dht import REFRESH_DEBOUNCE_S, REFRESH_INTERVAL_S, Dht


async def test_arrivals_within_debounce_share_one_refresh(autojump_clock: trio.testing.MockClock) -> None:
    refreshes = 0

    async def refresh_routing_table() -> None:
        nonlocal refreshes
        refreshes += 1

    kad: Any = SimpleNamespace(
        host=SimpleNamespace(get_connected_peers=lambda: ["peer"]), refresh_routing_table=refresh_routing_table
    )
    dht = Dht(1.0, lambda peer, multiaddrs: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dht._refresh_after_arrivals, kad)
        for _ in range(2):
            dht.peer_connected()
            await trio.sleep(REFRESH_DEBOUNCE_S / 2)
        await trio.sleep(2 * REFRESH_INTERVAL_S)
        nursery.cancel_scope.cancel()
    assert refreshes == 1
