"""Known peers: the way back into the swarm when no bootstrap peer answers any more.

They are dialled whenever connections are few, not only at the start: a machine may start before its network is up,
sleep, or wake up elsewhere, and a cable may be pulled for longer than heartbeats are remembered.
"""

import math
import random
import time

import structlog
import trio

from node.network.interface import Network, NetworkError
from node.storage.database import StorageError
from node.storage.peers import KnownPeer, KnownPeerStore
from node.util.backoff import backoff_s

REDIALLED = 16
"""Known peers that are dialled at a time, the latest ones first."""

FEW_CONNECTIONS = 3
"""With fewer connections known peers are dialled: those that are left may be cut off from the swarm as we are."""

BACKOFF_S = (4.0, 60.0)
"""Pause between two rounds of dials."""

LASTING_S = 60.0
"""Connections that lasted for so long begin the pauses anew once they are lost; others are dials that failed late."""

ROUND_S = 2.0
DIAL_TIMEOUT_S = 20.0

SAVE_ROUND_S = 60.0
"""Interval at which the connected peers are stored."""

FIRST_SAVE_S = 6.0
"""Interval until there are any."""

_logger = structlog.get_logger(__name__)


async def maintain_known_peers(network: Network, store: KnownPeerStore, jitter: random.Random) -> None:
    """Dial known peers while connections are few, and store the connected ones, until cancelled.

    Survives disk errors.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_redial_loop, network, store, jitter)
        nursery.start_soon(_save_loop, network, store)


async def _redial_loop(network: Network, store: KnownPeerStore, jitter: random.Random) -> None:
    rounds, due_s, connected_at_s = 0, -math.inf, math.inf
    while True:
        connected, now_s = network.connected_peers(), trio.current_time()
        if connected:
            connected_at_s = min(connected_at_s, now_s)
        is_lasting = now_s - connected_at_s >= LASTING_S
        if is_lasting and (not connected or len(connected) >= FEW_CONNECTIONS):
            rounds, due_s = 0, -math.inf
        if not connected:
            connected_at_s = math.inf
        if len(connected) < FEW_CONNECTIONS and now_s >= due_s:
            await _redial(network, store)
            rounds += 1
            due_s = trio.current_time() + backoff_s(rounds, BACKOFF_S, jitter)
        await trio.sleep(ROUND_S)


async def _redial(network: Network, store: KnownPeerStore) -> None:
    """Dial the latest known peers that are not connected, all at once."""
    try:
        known = await store.latest(REDIALLED)
    except StorageError as error:
        _logger.warning("could not load known peers", reason=str(error))
        return
    with trio.move_on_after(DIAL_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for peer in known:
                if peer.peer not in network.connected_peers() and peer.multiaddrs:
                    nursery.start_soon(_dial, network, peer)


async def _dial(network: Network, peer: KnownPeer) -> None:
    network.add_addresses(peer.peer, peer.multiaddrs)
    try:
        await network.connect(peer.multiaddrs[0])
    except NetworkError as error:
        _logger.debug("known peer not reached", peer=peer.peer, multiaddrs=peer.multiaddrs, reason=str(error))


async def _save_loop(network: Network, store: KnownPeerStore) -> None:
    pause_s = FIRST_SAVE_S
    while True:
        await trio.sleep(pause_s)
        now_s = int(time.time())
        found = [KnownPeer(peer, network.addresses_of(peer), now_s) for peer in network.connected_peers()]
        if connected := [peer for peer in found if peer.multiaddrs]:
            pause_s = SAVE_ROUND_S
            try:
                await store.put(connected)
            except StorageError as error:
                _logger.warning("could not store known peers", reason=str(error))
