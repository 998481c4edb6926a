"""Peers remembered across restarts: the way back into the swarm when no bootstrap peer answers any more."""

import time
from collections.abc import Sequence
from typing import Protocol

import structlog
import trio

from node.network.interface import Network, NetworkError
from node.storage.database import StorageError
from node.storage.peers import RememberedPeer

REDIALLED = 16
"""Remembered peers that a starting node dials, those seen last first."""

SAVE_ROUND_S = 60.0
"""How often the connected peers are written down."""

_logger = structlog.get_logger(__name__)


class Book(Protocol):
    """Where peers are written down; `node.storage.peers` is the real one."""

    async def remember(self, peers: Sequence[RememberedPeer]) -> None:
        """Write peers down, over what was known of them."""
        ...

    async def recall(self, limit: int = 64) -> tuple[RememberedPeer, ...]:
        """Return the peers seen last."""
        ...


async def keep_acquaintances(network: Network, book: Book) -> None:
    """Dial the peers of last time, then write down those of this time, until cancelled. A disk fault ends nothing."""
    try:
        remembered = await book.recall(REDIALLED)
    except StorageError as error:
        _logger.warning("remembered peers cannot be read", reason=str(error))
        remembered = ()
    async with trio.open_nursery() as nursery:
        for peer in remembered:
            nursery.start_soon(_redial, network, peer)
    while True:
        await trio.sleep(SAVE_ROUND_S)
        now_s = int(time.time())
        seen = [RememberedPeer(peer, network.addresses_of(peer), now_s) for peer in network.connected_peers()]
        try:
            await book.remember([peer for peer in seen if peer.multiaddrs])
        except StorageError as error:
            _logger.warning("peers cannot be written down", reason=str(error))


async def _redial(network: Network, peer: RememberedPeer) -> None:
    for multiaddr in peer.multiaddrs:
        try:
            await network.connect(multiaddr)
        except NetworkError as error:
            _logger.debug("remembered peer not reached", peer=peer.peer, multiaddr=multiaddr, reason=str(error))
        else:
            return
