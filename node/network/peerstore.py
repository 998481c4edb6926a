"""A bounded peer store: the library's accepts any number of addresses and protocols from any peer."""

from collections.abc import Sequence
from typing import Final

from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from multiaddr import Multiaddr

from protocol.limits import MAX_ADDRESSES

MAX_PEERS: Final = 4096
MAX_PROTOCOLS: Final = 256
MAX_ENVELOPE_BYTES: Final = 8 << 10


class BoundedPeerStore(PeerStore):
    """A peer store with bounds on peers, addresses, protocols and records."""

    def __init__(self) -> None:
        super().__init__(max_records=MAX_PEERS, max_peers=MAX_PEERS)

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        """Learn addresses: the latest count."""
        latest = list(dict.fromkeys(addrs))[:MAX_ADDRESSES]
        super().add_addrs(peer_id, latest, ttl)
        data = self.peer_data_map.get(peer_id)
        if data is not None and len(data.addrs) > MAX_ADDRESSES:
            data.addrs = [*(address for address in data.addrs if address not in latest), *latest][-MAX_ADDRESSES:]

    def set_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Learn which protocols a peer speaks."""
        super().set_protocols(peer_id, list(protocols)[:MAX_PROTOCOLS])

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Learn that a peer speaks more protocols."""
        data = self.peer_data_map.get(peer_id)
        known = len(data.get_protocols()) if data is not None else 0
        super().add_protocols(peer_id, list(protocols)[: max(0, MAX_PROTOCOLS - known)])

    def consume_peer_record(self, envelope: Envelope, ttl: int) -> bool:
        """Store a signed record, unless it is too large."""
        if len(envelope.raw_payload) > MAX_ENVELOPE_BYTES:
            return False
        accepted = super().consume_peer_record(envelope, ttl)
        while len(self.peer_record_map) > self.max_records:
            del self.peer_record_map[next(iter(self.peer_record_map))]
        return accepted
