"""The simulated network: `Network` in memory, for hundreds of peers in one process.

Byte streams behave as the real ones do: windows of 256 KiB, the same errors, the same timeouts.
"""

from node.network.addresses import TcpAddress
from node.testing.memory_links import MemoryLinks
from node.testing.memory_network import MemoryNetwork
from protocol.identity import PeerId


class MemoryNetworkHub(MemoryLinks[MemoryNetwork]):
    """Makes the networks of a simulation's peers and connects them; peers are killed, stopped and partitioned here."""

    def network(self, peer_id: PeerId) -> MemoryNetwork:
        """Make the network of a peer; again for one that was killed and comes back."""
        number = len(self.by_endpoint) + 1
        address = TcpAddress("ip4", f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 4001, peer_id)
        network = MemoryNetwork(self, peer_id, address)
        self.networks[peer_id] = network
        self.by_endpoint[address.endpoint] = network
        return network
