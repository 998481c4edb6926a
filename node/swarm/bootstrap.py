"""Dials the bootstrap addresses until they answer, and again whenever a connection is lost."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
import trio

from node.network.interface import Network, NetworkError
from node.util.backoff import backoff_s
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
        self._states = {multiaddr: Bootstrap(multiaddr, None, "not dialled yet") for multiaddr in multiaddrs}

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
        while True:
            known = self._states[multiaddr].peer
            if known is None or known not in self._network.connected_peers():
                try:
                    peer = await self._network.connect(multiaddr)
                except NetworkError as error:
                    failures += 1
                    self._states[multiaddr] = Bootstrap(multiaddr, known, str(error))
                    _logger.warning("bootstrap peer not reached", multiaddr=multiaddr, reason=str(error))
                else:
                    failures = 0
                    self._states[multiaddr] = Bootstrap(multiaddr, peer, None)
            await trio.sleep(backoff_s(failures + 1, BACKOFF_S, self._jitter))
