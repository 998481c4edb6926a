"""The simulated network: `Network` in memory, for hundreds of peers in one process.

Byte streams behave as the real ones do: windows of 256 KiB, the same errors, the same timeouts.
"""

import itertools
import random

from node.network.addresses import AddressBook, TcpAddress
from node.testing.memory_links import LinkModel, MemoryLinks
from node.testing.memory_network import MemoryNetwork
from protocol.identity import PeerId


class MemoryNetworkHub(MemoryLinks[MemoryNetwork]):
    """Makes the networks of a simulation's peers and connects them; peers are killed, stopped and partitioned here."""

    def __init__(
        self, rng: random.Random, link: LinkModel | None = None, *, address_book: AddressBook | None = None
    ) -> None:
        super().__init__(rng, link, address_book=address_book)
        self._hosts = itertools.count(1)

    def network(self, peer_id: PeerId) -> MemoryNetwork:
        """Make the network of a peer; again for one that was killed and comes back."""
        number = next(self._hosts)
        address = TcpAddress("ip4", f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 4001, peer_id)
        network = MemoryNetwork(self, peer_id, address)
        self.networks[peer_id] = network
        self.by_endpoint[address.endpoint] = network
        return network
