"""Dials the bootstrap addresses until they answer, and again whenever a connection is lost."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
import trio

from node.network.interface import Network, NetworkError
from node.util.backoff import backoff_s
from node.util.lasting_failure import LastingFailure
from protocol.identity import PeerId

BACKOFF_S = (0.5, 30.0)

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """State of one bootstrap address, for status and log."""

    multiaddr: str
    peer: PeerId | None
    error: str | None


class BootstrapDialler:
    """Keeps connections to the bootstrap peers."""

    def __init__(self, network: Network, multiaddrs: Iterable[str], jitter: random.Random) -> None:
        self._network = network
        self._jitter = jitter
        # A list that all nodes of a swarm share has this one, too.
        others = (multiaddr for multiaddr in multiaddrs if not multiaddr.endswith(f"/p2p/{network.peer_id}"))
        self._states = {multiaddr: Bootstrap(multiaddr, None, "not dialled yet") for multiaddr in others}

    def states(self) -> tuple[Bootstrap, ...]:
        """Return the state of each address."""
        return tuple(self._states.values())

    async def run(self) -> None:
        """Keep dialling until cancelled."""
        async with trio.open_nursery() as nursery:
            for multiaddr in self._states:
                nursery.start_soon(self._dial_loop, multiaddr)

    async def _dial_loop(self, multiaddr: str) -> None:
        failures = 0
        failure = LastingFailure()
        while True:
            known = self._states[multiaddr].peer
            if known is None or known not in self._network.connected_peers():
                try:
                    peer = await self._network.connect(multiaddr)
                except NetworkError as error:
                    failures += 1
                    self._states[multiaddr] = Bootstrap(multiaddr, known, str(error))
                    if failure.is_due(str(error)):
                        _logger.warning("bootstrap peer not reached", multiaddr=multiaddr, reason=str(error))
                else:
                    failures = 0
                    failure.ended()
                    self._states[multiaddr] = Bootstrap(multiaddr, peer, None)
            await trio.sleep(backoff_s(failures + 1, BACKOFF_S, self._jitter))
