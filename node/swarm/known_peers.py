"""Peers known from earlier runs: the way back into the swarm when no bootstrap peer answers any more."""

import time

import structlog
import trio

from node.network.interface import Network, NetworkError
from node.storage.database import StorageError
from node.storage.peers import KnownPeer, KnownPeerStore

REDIALLED = 16
"""Known peers that a starting node dials, the latest ones first."""

SAVE_ROUND_S = 60.0
"""Interval at which the connected peers are stored."""

_logger = structlog.get_logger(__name__)


async def maintain_known_peers(network: Network, store: KnownPeerStore) -> None:
    """Dial the known peers, then store the connected ones at intervals, until cancelled. Survives disk errors."""
    try:
        known = await store.latest(REDIALLED)
    except StorageError as error:
        _logger.warning("could not load known peers", reason=str(error))
        known = ()
    async with trio.open_nursery() as nursery:
        for peer in known:
            nursery.start_soon(_redial, network, peer)
    while True:
        await trio.sleep(SAVE_ROUND_S)
        now_s = int(time.time())
        connected = [KnownPeer(peer, network.addresses_of(peer), now_s) for peer in network.connected_peers()]
        try:
            await store.put([peer for peer in connected if peer.multiaddrs])
        except StorageError as error:
            _logger.warning("could not store known peers", reason=str(error))


async def _redial(network: Network, peer: KnownPeer) -> None:
    for multiaddr in peer.multiaddrs:
        try:
            await network.connect(multiaddr)
        except NetworkError as error:
            _logger.debug("known peer not reached", peer=peer.peer, multiaddr=multiaddr, reason=str(error))
        else:
            return
